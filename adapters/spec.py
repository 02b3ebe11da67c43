"""The names that make a host supported. Data only: nothing here touches a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vision_remember.encoder import EncoderSpec
from vision_remember.registry import did_you_mean


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Where things are in a decoder-only language model.

    Attributes:
        model_type: its ``config.model_type``.
        layers: path of the layers, a ``ModuleList`` whose items take the hidden states first and any keywords.
        hidden_size: path of the width.
    """

    model_type: str
    layers: str = "layers"
    hidden_size: str = "config.hidden_size"


@dataclass(frozen=True, kw_only=True)
class MLLMSpec:
    """Where things are in a multimodal model: dotted attribute paths from the model given to attach.

    A spec is validated against the model when attached and saved with the adapter. Hosts, decoders and encoders in the
    tables need none; for a model of your own::

        attach_vision_remember(model, spec=MLLMSpec(name="mine", decoder="model.lm", decoder_spec=DecoderSpec(...)))

    Attributes:
        name: ``config.model_type`` of the host.
        base: the module whose forward encodes images and calls the decoder, and whose ``get_image_features`` returns
            an output with ``pooler_output``, one (h*w, D) tensor per image.
        encoder: the vision encoder.
        projector: the module between encoder and decoder.
        decoder: the language model whose layers are called with the keywords given to the base.
        image_token_id: the placeholder's token id.
        plain: an image is one tile whose tokens follow in raster order, with nothing between them. Otherwise the order
            is read off the host's own packing in each call.
        encoder_spec: for an encoder that is not in the table.
        decoder_spec: for a decoder that is not in the table.
    """

    name: str
    base: str = "model"
    encoder: str = "model.vision_tower"
    projector: str = "model.multi_modal_projector"
    decoder: str = "model.language_model"
    image_token_id: str = "config.image_token_id"
    plain: bool = False
    encoder_spec: EncoderSpec | None = None
    decoder_spec: DecoderSpec | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MLLMSpec:
        """The inverse of :meth:`to_dict`; raises ValueError for an unknown field."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in data:
            if name not in known:
                raise ValueError(f"MLLMSpec has no field {name!r}: {did_you_mean(name, known)}")
        data = dict(data)
        if data.get("encoder_spec"):
            classes = tuple(data["encoder_spec"]["classes"])
            data["encoder_spec"] = EncoderSpec(**{**data["encoder_spec"], "classes": classes})
        if data.get("decoder_spec"):
            data["decoder_spec"] = DecoderSpec(**data["decoder_spec"])
        return cls(**data)
