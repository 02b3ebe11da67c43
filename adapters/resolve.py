"""Finds the parts of a host by its spec. Looks, never touches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vision_remember.adapters.decoders import DECODERS
from vision_remember.adapters.devices import all_on_meta
from vision_remember.adapters.discover import discover
from vision_remember.adapters.encoders import encoder_spec
from vision_remember.adapters.hosts import HOSTS
from vision_remember.adapters.spec import DecoderSpec, MLLMSpec, TokenGeometry
from vision_remember.encoder import EncoderSpec, find, find_module
from vision_remember.grid import Grid


@dataclass(frozen=True)
class HostParts:
    """The parts of a host, found and checked.

    Attributes:
        model: the model itself, unwrapped.
        spec: complete: encoder and decoder specs filled in.
        base: encodes images, merges them and calls the decoder.
        encoder: the vision encoder.
        projector: between encoder and decoder; None if there is none outside the encoder.
        decoder: the language model.
        layers: the decoder's layers.
        hidden_size: D, width of the decoder.
        image_token_id: the placeholder's token id.
        video_token_id: the placeholder's token id for video; None if the host takes none.
        feature_grid: (H, W) of a tile; None where images have grids of their own.
    """

    model: nn.Module
    spec: MLLMSpec
    base: nn.Module
    encoder: nn.Module
    encoder_spec: EncoderSpec
    projector: nn.Module | None
    decoder: nn.Module
    layers: nn.ModuleList
    hidden_size: int
    image_token_id: int
    video_token_id: int | None
    feature_grid: Grid | None

    @property
    def token_grid(self) -> Grid | None:
        """(h, w) of a tile's tokens; None where images have grids of their own or tokens have no place."""
        geometry = self.spec.geometry
        if self.feature_grid is None or (geometry is not None and geometry.cells is None):
            return None
        return projected_grid(self.projector, geometry, self.feature_grid, 0)


def projected_grid(
    projector: nn.Module | None, geometry: TokenGeometry | None, feature_grid: Grid, tokens: int
) -> Grid:
    """(h, w) of the tokens of a tile with ``feature_grid``.

    Args:
        projector: one of ours knows its grid.
        geometry: of any other; None for one token per cell.
        feature_grid: of the tile.
        tokens: of the tile.
    """
    # By method, not by class: PEFT wraps modules that it trains and forwards their attributes.
    out_grid = getattr(projector, "out_grid", None)
    if out_grid is not None:
        grid: Grid = out_grid(feature_grid)
        return grid
    return feature_grid if geometry is None else geometry.tokens_of(feature_grid, tokens)


def unwrapped(model: nn.Module) -> nn.Module:
    """The host inside a PEFT model, any other model as it is."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def trained_copy(module: nn.Module) -> nn.Module:
    """The copy that PEFT trains of a module named in its ``modules_to_save``; any other module as it is."""
    copies = getattr(module, "modules_to_save", None)
    return copies[module.active_adapter] if isinstance(copies, nn.ModuleDict) else module  # type: ignore[index]


def adapted_part(module: nn.Module) -> str | None:
    """The name of a part that PEFT has put a layer of its own around; None if there is none."""
    wrapped = (name for name, m in module.named_modules() if hasattr(m, "base_layer") or hasattr(m, "original_module"))
    return next(wrapped, None)


def level_field(model: nn.Module) -> str | None:
    """The field of a host's configuration that says which encoder levels its projector reads; None if it has none.

    Vip-LLaVA's, and the argument of the same name, are in the plural in older versions of transformers.
    """
    names = ("vision_feature_layer", "vision_feature_layers")
    return next((name for name in names if hasattr(getattr(model, "config", None), name)), None)


def levels_read(model: nn.Module) -> Any:
    """What :func:`level_field` holds: one level, several, or None; the last one, -1, where there is no such field."""
    field = level_field(model)
    return -1 if field is None else getattr(model.config, field)


def encoders(parts: HostParts) -> list[nn.Module]:
    """The vision encoder, and whatever stands beside it and reads pixels or sound: of video, say."""
    readers = [m for m in parts.model.modules() if isinstance(m, PreTrainedModel) and m.main_input_name != "input_ids"]
    return [parts.encoder, *(reader for reader in readers if parts.decoder not in reader.modules())]


def resolve(model: nn.Module, spec: MLLMSpec | None = None) -> HostParts:
    """The parts of a host.

    Args:
        model: a multimodal model, perhaps inside a PEFT model.
        spec: None looks it up in ``HOSTS`` by ``config.model_type``, or finds it out.

    Raises:
        ValueError: no spec can be found, or the spec names what the model does not have.
    """
    model = unwrapped(model)
    if spec is None:
        spec = host_spec(model)
    elif not isinstance(spec, MLLMSpec):
        raise ValueError(f"spec={spec!r}: expected an MLLMSpec, as MLLMSpec.from_dict makes it")
    base = find_module(model, spec.base, "base")
    if not callable(getattr(base, "get_image_features", None)):
        raise ValueError(f"{type(base).__name__} at {spec.base!r} has no get_image_features to read an image's tokens")
    encoder = trained_copy(find_module(model, spec.encoder, "vision encoder"))
    projector = None if spec.projector is None else find_module(model, spec.projector, "projector")
    decoder = find_module(model, spec.decoder, "decoder")
    if projector is not None and not {encoder, decoder}.isdisjoint(projector.modules()):
        raise ValueError(
            f"{type(projector).__name__} at {spec.projector!r} holds the encoder or the decoder: expected the projector"
        )
    encoder_names = spec.encoder_spec or encoder_spec(encoder)
    decoder_names = spec.decoder_spec or _decoder_spec(decoder)
    layers = find_module(decoder, decoder_names.layers, "layers")
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(decoder).__name__}.{decoder_names.layers}: expected a ModuleList of decoder layers")
    return HostParts(
        model=model,
        spec=MLLMSpec(**{**vars(spec), "encoder_spec": encoder_names, "decoder_spec": decoder_names}),
        base=base,
        encoder=encoder,
        encoder_spec=encoder_names,
        projector=projector,
        decoder=decoder,
        layers=layers,
        hidden_size=_number(decoder, decoder_names.hidden_size, "width"),
        image_token_id=_number(model, spec.image_token_id, "image token id"),
        video_token_id=_optional_number(model, spec.video_token_id) if has_video(base) else None,
        feature_grid=spec.geometry.feature_grid if spec.geometry else _feature_grid(encoder, encoder_names),
    )


def block_placement(layer: nn.Module, base: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for a block in front of a decoder layer.

    Under ``torch.device("meta")`` the whole model is meant to have no weights.

    Raises:
        ValueError: the layer's weights are not loaded yet.
    """
    floating = [p for p in layer.parameters() if p.is_floating_point()]
    if any(p.device.type == "meta" for p in floating) and not all_on_meta():
        raise ValueError("the decoder's weights are on the meta device: load them before attaching")
    # A quantised layer keeps norms in the dtype that the model computes in; failing these, the base's dtype.
    wide = [p for p in floating if p.dtype.itemsize >= 2] or [p for p in base.parameters() if p.is_floating_point()]
    return next(layer.parameters()).device, wide[0].dtype


def model_type_of(module: nn.Module) -> str:
    """``config.model_type`` of a transformers model, the class's name of any other module."""
    return getattr(getattr(module, "config", None), "model_type", type(module).__name__)


def has_video(base: nn.Module) -> bool:
    """Whether a host encodes video by a method of its own."""
    return callable(getattr(base, "get_video_features", None))


def host_spec(model: nn.Module) -> MLLMSpec:
    """The spec of a host from the table; for any other what can be found out about it."""
    model_type = model_type_of(model)
    return HOSTS[model_type] if model_type in HOSTS else discover(model)


def _decoder_spec(decoder: nn.Module) -> DecoderSpec:
    model_type = model_type_of(decoder)
    return DECODERS[model_type] if model_type in DECODERS else DecoderSpec(model_type=model_type)


def _number(root: nn.Module, path: str, what: str) -> int:
    try:
        value: Any = find(root, path)
    except AttributeError:
        value = None
    if not isinstance(value, int):
        raise ValueError(f"{type(root).__name__}.{path} is {value!r}: expected the {what}, a whole number")
    return value


def _optional_number(root: nn.Module, path: str) -> int | None:
    try:
        value: Any = find(root, path)
    except AttributeError:
        return None
    return value if isinstance(value, int) else None


def _feature_grid(encoder: nn.Module, spec: EncoderSpec) -> Grid | None:
    if spec.image_size is None or spec.patch_embedding is None:
        return None
    size: Any = find(encoder, spec.image_size)
    height, width = (size, size) if isinstance(size, int) else size
    patches: Any = find_module(encoder, spec.patch_embedding, "patch embedding")
    rows, columns = patches.stride
    return height // rows, width // columns
