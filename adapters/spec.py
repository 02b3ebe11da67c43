"""The names that make a host supported. Data only: nothing here touches a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vision_remember.encoder import EncoderSpec
from vision_remember.grid import Grid
from vision_remember.registry import did_you_mean
from vision_remember.typed import check_fields


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

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TokenGeometry:
    """How the tokens of a tile lie over its cells.

    Attributes:
        feature_grid: (H, W) of every tile; None where images have grids of their own.
        token_grid: (h, w) of every tile's tokens; None where it follows from ``cells``.
        cells: (rows, columns) of cells under a token; None where a token stands for the whole tile, as those of a
            resampler or Q-Former do.
    """

    feature_grid: Grid | None = None
    token_grid: Grid | None = None
    cells: Grid | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def tokens_of(self, feature_grid: Grid, tokens: int) -> Grid:
        """(h, w) of the tokens of a tile.

        Args:
            feature_grid: of the tile.
            tokens: how many it has, where they have no place.
        """
        if self.cells is None:
            return 1, tokens
        if self.token_grid is not None and feature_grid == self.feature_grid:
            return self.token_grid
        return feature_grid[0] // self.cells[0], feature_grid[1] // self.cells[1]


@dataclass(frozen=True, kw_only=True)
class MLLMSpec:
    """Where things are in a multimodal model: dotted attribute paths from the model given to attach.

    A spec is validated against the model when attached and saved with the adapter. Hosts, decoders and encoders in the
    tables need none; for a model of your own::

        attach_vision_remember(model, spec=MLLMSpec(name="mine", decoder="model.lm", decoder_spec=DecoderSpec(...)))

    Attributes:
        name: ``config.model_type`` of the host.
        base: the module whose forward encodes images and calls the decoder, and whose ``get_image_features`` returns
            (h*w, D) of each image, as it is or as the ``pooler_output`` of an output.
        encoder: the vision encoder.
        projector: the module between encoder and decoder; None if there is none outside the encoder.
        decoder: the language model whose layers are called with the keywords given to the base.
        image_token_id: the placeholder's token id.
        video_token_id: the placeholder's token id for video, where the host has ``get_video_features``.
        geometry: how a tile's tokens lie over its cells; None for one token per cell.
        plain: the tokens of all tiles follow one another, each tile's in raster order, with nothing between them.
            Otherwise the order is read off the host's own packing in each call.
        feature_levels: path of the level or levels of ``hidden_states`` that the base hands to the projector, where it
            reads nothing else of the encoder's output in a forward pass; its last part is also the name of the argument
            of ``get_image_features`` that goes before it. Blocks behind the last level that is read are left out. None
            where that is not known.
        encoder_spec: for an encoder that is not in the table.
        decoder_spec: for a decoder that is not in the table.
    """

    name: str
    base: str = "model"
    encoder: str = "model.vision_tower"
    projector: str | None = "model.multi_modal_projector"
    decoder: str = "model.language_model"
    image_token_id: str = "config.image_token_id"
    video_token_id: str = "config.video_token_id"
    geometry: TokenGeometry | None = None
    plain: bool = False
    feature_levels: str | None = None
    encoder_spec: EncoderSpec | None = None
    decoder_spec: DecoderSpec | None = None

    def __post_init__(self) -> None:
        check_fields(self)

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
        if data.get("geometry"):
            pairs = {name: value and tuple(value) for name, value in data["geometry"].items()}
            data["geometry"] = TokenGeometry(**pairs)
        if data.get("encoder_spec"):
            classes = tuple(data["encoder_spec"]["classes"])
            data["encoder_spec"] = EncoderSpec(**{**data["encoder_spec"], "classes": classes})
        if data.get("decoder_spec"):
            data["decoder_spec"] = DecoderSpec(**data["decoder_spec"])
        return cls(**data)
