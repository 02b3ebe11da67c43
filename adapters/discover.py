"""Finds out what a multimodal model that is in no table is made of, by what transformers models have in common."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vision_remember.adapters.describe import conjectures
from vision_remember.adapters.encoders import known_encoder
from vision_remember.adapters.sample import samples
from vision_remember.adapters.self_test import Geometry, find_geometry
from vision_remember.adapters.spec import DecoderSpec, MLLMSpec, TokenGeometry
from vision_remember.adapters.tokens import wants_tuple
from vision_remember.encoder import EncoderSpec, find_module

_PROJECTORS = (
    *("multi_modal_projector", "multimodal_projector", "connector", "aligner", "projector", "mm_projector"),
    *("vision_projection", "modality_projection", "embed_vision", "vision_projector", "merger", "language_projection"),
)


def discover(model: nn.Module) -> MLLMSpec:
    """The spec of a host, found by its accessors and by running it on a small noise image.

    The image shows which cells each token stands for. Nothing is changed, but transformers models install hooks of
    their own in the first forward pass.

    Raises:
        ValueError: the host works in another way; the message says what is missing.
    """
    name = type(model).__name__
    base: Any = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or not callable(getattr(base, "get_image_features", None)):
        raise ValueError(
            f"{name} has no get_image_features on its base model, which would make image tokens of pixels: "
            f"{_other_way(model)}. {_advice()}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder: the layers of its decoder hold no image tokens, they look at the encoder's"
        )
    if base is model and "generate" in vars(type(model)):
        raise ValueError(
            f"{name} has a generate() of its own, which encodes images and runs the language model without the forward "
            "pass that carries the memory"
        )
    encoder = _accessor(model, "encoder")
    decoder = _accessor(model, "decoder")
    layers = _layers(decoder)
    _refuse_streams(decoder)
    encoder_spec, geometry = _geometry(model, base, encoder)
    projector = _projector(model, base, encoder)
    if projector is not None and hasattr(find_module(model, projector, "projector"), "out_grid"):
        # A swapped one says itself how its tokens lie; the spec, which is saved, is of the host as it comes.
        geometry = dataclasses.replace(geometry, token_grid=geometry.feature_grid, cells=(1, 1))
    return MLLMSpec(
        name=getattr(getattr(model, "config", None), "model_type", name),
        base=_path(model, base),
        encoder=_path(model, encoder),
        projector=projector,
        decoder=_path(model, decoder),
        plain=True,
        geometry=geometry,
        encoder_spec=encoder_spec,
        decoder_spec=DecoderSpec(
            model_type=getattr(getattr(decoder, "config", None), "model_type", type(decoder).__name__), layers=layers
        ),
    )


def _other_way(model: nn.Module) -> str:
    """How images may reach the language model of a host that makes no image tokens."""
    crossing = next((n for n in (type(m).__name__ for m in model.modules()) if "crossattention" in n.lower()), None)
    if crossing is not None:
        return f"its language model looks at images by cross-attention ({crossing})"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose decoder looks at images by cross-attention"
    return "if it takes images, they reach the language model by code of its own"


def _accessor(model: Any, which: str) -> nn.Module:
    try:
        part = model.get_encoder(modality="image") if which == "encoder" else model.get_decoder()
    except (AttributeError, TypeError, ValueError):
        part = None
    if not isinstance(part, nn.Module) or part is model:
        raise ValueError(f"{type(model).__name__} names no {which} (get_{which}). {_advice()}")
    return part


def _layers(decoder: nn.Module) -> str:
    for path in ("layers", "model.layers", "decoder.layers", "model.decoder.layers"):
        module: Any = decoder
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.ModuleList):
            return path
    raise ValueError(f"{type(decoder).__name__} has no list of decoder layers. {_advice()}")


def _refuse_streams(decoder: nn.Module) -> None:
    for name in ("hc_mult", "hc_count"):
        streams = getattr(getattr(decoder, "config", None), name, 1)
        if streams > 1:
            raise ValueError(
                f"the layers of {type(decoder).__name__} hand on {streams} streams of hidden states (config.{name}); "
                "a block refines one"
            )


def _geometry(model: nn.Module, base: Any, encoder: nn.Module) -> tuple[EncoderSpec, TokenGeometry]:
    """The encoder's spec and the tokens' geometry: the first conjecture that holds exactly, or else nearly."""
    known = known_encoder(encoder)
    failures: list[str] = []
    encode = base.get_image_features
    if wants_tuple(base):
        encode = functools.partial(encode, return_dict=True)
    nearly: list[tuple[EncoderSpec, TokenGeometry]] = []
    for spec in [known] if known else conjectures(encoder):
        for sample in _distinct(samples(base, base.get_image_features, encoder, spec)):
            try:
                with torch.random.fork_rng():
                    found = find_geometry(encoder, spec, encode, sample)
                agreed = spec, _summary(found)
                if all(part.exact for part in found):
                    return agreed
                nearly.append(agreed)
            except (ValueError, RuntimeError, TypeError, IndexError, AttributeError, KeyError) as error:
                failures.append(f"{spec.order}, {_shapes(sample)}: {type(error).__name__}: {error}")
    if nearly:
        return nearly[0]
    tried = "\n  ".join(failures) or "no form of image that its get_image_features takes is known"
    raise ValueError(
        f"{type(model).__name__}: could not find out which part of an image each token stands for. {_advice()}\n"
        f"Tried:\n  {tried}"
    )


def _summary(found: list[Geometry]) -> TokenGeometry:
    """One geometry for tiles of all sizes.

    Raises:
        ValueError: sizes differ in how many cells a token has.
    """
    if any(part.token_grid is None for part in found):
        fixed = len(found) == 1
        return TokenGeometry(feature_grid=found[0].feature_grid if fixed else None)
    cells = {
        tuple(-(-of // by) for of, by in zip(part.feature_grid, part.token_grid or (1, 1), strict=True))
        for part in found
    }
    if len(cells) > 1:
        raise ValueError(f"tokens stand for differently many cells: {sorted(cells)}")
    rows, columns = cells.pop()
    if len(found) > 1:
        return TokenGeometry(cells=(rows, columns))
    return TokenGeometry(feature_grid=found[0].feature_grid, token_grid=found[0].token_grid, cells=(rows, columns))


def _projector(model: nn.Module, base: nn.Module, encoder: nn.Module) -> str | None:
    for owner in (base, encoder):
        for name in _PROJECTORS:
            module = getattr(owner, name, None)
            if isinstance(module, nn.Module):
                return _path(model, module)
    return None


def _path(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _distinct(forms: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    seen = set()
    for form in forms:
        if (shapes := _shapes(form)) not in seen:
            seen.add(shapes)
            yield form


def _shapes(sample: dict[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(getattr(value, 'shape', ()))}" for name, value in sample.items())


def _advice() -> str:
    return "Describe it with a spec: attach_vision_remember(model, spec=MLLMSpec(...))"
