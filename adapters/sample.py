"""A small image in the form that a host takes, to try the host with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.encoder import EncoderSpec, find

_SIDES = ((6, 10), (4, 8))
"""Rows and columns of the sample's images, in blocks of cells: not square, so that a mix-up of the two shows."""

_ANY_SIZE = (256, 256)
"""Pixels of the sample for an encoder that names no size: convolutions take any."""


def samples(
    base: nn.Module, get_image_features: Callable[..., Any], encoder: nn.Module, spec: EncoderSpec
) -> Iterator[dict[str, Any]]:
    """Arguments of ``get_image_features`` for small noise images: the likely forms, most likely first.

    Raises:
        ValueError: the host takes arguments that are not known here.
    """
    names = [
        name
        for name, parameter in inspect.signature(get_image_features).parameters.items()
        if parameter.kind != inspect.Parameter.VAR_KEYWORD and name != "self"
    ]
    like = next(parameter for parameter in encoder.parameters() if parameter.is_floating_point())
    for form in _FORMS:
        for arguments in form(encoder, spec, set(names)):
            generator = torch.Generator().manual_seed(0)
            yield {name: _made(value, like, generator) for name, value in arguments.items()}


def _made(value: Any, like: Tensor, generator: torch.Generator) -> Any:
    """Pixels for a shape, a tensor on the model's device for numbers."""
    if isinstance(value, torch.Size):
        return torch.randn(value, generator=generator).to(like)
    return value.to(like.device) if isinstance(value, Tensor) else value


def _packed(encoder: nn.Module, spec: EncoderSpec, names: set[str]) -> Iterator[dict[str, Any]]:
    """Patches of images one after the other, and the images' grids (Qwen2-VL)."""
    if "image_grid_thw" not in names:
        return
    merge = (
        _number(encoder, spec.merge)
        or _number(encoder, "merge_kernel_size")
        or _number(encoder, "config.merge_size")
        or 2
    )
    grids = torch.tensor([[1, rows * merge, columns * merge] for rows, columns in _SIDES])
    count = int(grids.prod(1).sum())
    more = {"image_merge_sizes": torch.tensor([merge] * len(_SIDES))} if "image_merge_sizes" in names else {}
    for shape in _patch_shapes(encoder):
        yield {"pixel_values": torch.Size((count, *shape)), "image_grid_thw": grids, **more}


def _sized(encoder: nn.Module, spec: EncoderSpec, names: set[str]) -> Iterator[dict[str, Any]]:
    """Padded images and their sizes in pixels (Pixtral)."""
    if "image_sizes" not in names or spec.size_unit is None:
        return
    unit = _number(encoder, spec.size_unit) or 1
    sizes = torch.tensor([[rows * unit * 2, columns * unit * 2] for rows, columns in _SIDES])
    height, width = sizes.amax(0).tolist()
    yield {"pixel_values": torch.Size((len(sizes), 3, height, width)), "image_sizes": sizes}


def _padded(encoder: nn.Module, spec: EncoderSpec, names: set[str]) -> Iterator[dict[str, Any]]:
    """Padded sequences of patches and the images' grids (SigLIP 2 NaFlex)."""
    if "spatial_shapes" not in names:
        return
    shapes = torch.tensor([[rows * 2, columns * 2] for rows, columns in _SIDES])
    lengths = shapes.prod(1)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    for shape in _patch_shapes(encoder):
        yield {
            "pixel_values": torch.Size((len(shapes), int(lengths.max()), *shape)),
            "spatial_shapes": shapes,
            "pixel_attention_mask": mask.long(),
        }


def _square(encoder: nn.Module, spec: EncoderSpec, names: set[str]) -> Iterator[dict[str, Any]]:
    """Square images, each by itself or as the only tile of a sample."""
    if not {"pixel_values", "pixel_values_images"} & names or {"image_grid_thw", "spatial_shapes"} & names:
        return
    size = _size(encoder, spec) or _ANY_SIZE
    name = "pixel_values_images" if "pixel_values_images" in names else "pixel_values"
    more: dict[str, Any] = {}
    if "image_sizes" in names:
        more = {"image_sizes": torch.tensor([size] * 2)}
    yield {name: torch.Size((2, 3, *size)), **more}
    yield {name: torch.Size((1, 2, 3, *size)), **more}
    if "pixel_attention_mask" in names:
        yield {name: torch.Size((1, 2, 3, *size)), "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool)}


_FORMS = (_packed, _sized, _padded, _square)


def _patch_shapes(encoder: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes that one patch may have, by the encoder's patch embedding."""
    for module in encoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            yield (module.in_channels * math.prod(module.kernel_size),)
            yield (module.in_channels, *module.kernel_size)
            return
        if isinstance(module, nn.Linear):
            yield (module.in_features,)
            return


def _size(encoder: nn.Module, spec: EncoderSpec) -> tuple[int, int] | None:
    size = find(encoder, spec.image_size) if spec.image_size else None
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[-1])) if isinstance(size, (list, tuple)) else None


def _number(encoder: nn.Module, path: str | int) -> int | None:
    if isinstance(path, int):
        return path if path > 1 else None
    try:
        value: Any = find(encoder, path)
    except AttributeError:
        return None
    if isinstance(value, (list, tuple)):
        value = value[0]
    return value if isinstance(value, int) and value > 1 else None
