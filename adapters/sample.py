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

_SIZED = {"image_grid_thw", "image_grid_hw", "spatial_shapes", "target_sizes", "image_position_ids"}
"""Arguments that make square images the wrong form."""
_KNOWN = _SIZED | {
    *("pixel_values", "pixel_values_images", "high_res_pixel_values", "image_sizes", "image_merge_sizes"),
    *("qformer_input_ids", "pixel_attention_mask"),
}
_ANY_SIZE = (256, 256)
"""Pixels of the sample for an encoder that names no size: convolutions take any."""


def samples(
    base: nn.Module, get_image_features: Callable[..., Any], encoder: nn.Module, spec: EncoderSpec
) -> Iterator[dict[str, Any]]:
    """Arguments of ``get_image_features`` for small noise images: the likely forms, most likely first.

    Raises:
        ValueError: the host takes arguments that are not known here.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(get_image_features).parameters.items()
        if parameter.kind != inspect.Parameter.VAR_KEYWORD and name != "self"
    }
    names = list(parameters)
    unknown = [name for name, given in parameters.items() if given.default is given.empty and name not in _KNOWN]
    if unknown:
        raise ValueError(f"get_image_features asks for {', '.join(unknown)}, which is not known here")
    extras = _extras(base, set(names))
    like = next(parameter for parameter in encoder.parameters() if parameter.is_floating_point())
    for form in _FORMS:
        for arguments in form(encoder, spec, set(names)):
            generator = torch.Generator().manual_seed(0)
            yield {name: _made(value, like, generator) for name, value in {**arguments, **extras}.items()}


def _made(value: Any, like: Tensor, generator: torch.Generator) -> Any:
    """Pixels for a shape, a tensor on the model's device for numbers."""
    if isinstance(value, torch.Size):
        return torch.randn(value, generator=generator).to(like)
    return value.to(like.device) if isinstance(value, Tensor) else value


def _extras(base: nn.Module, names: set[str]) -> dict[str, Any]:
    """What else a host asks for, for two images: a question to the resampler, pixels for a second encoder."""
    extras: dict[str, Any] = {}
    if "qformer_input_ids" in names:
        extras["qformer_input_ids"] = torch.ones(2, 3, dtype=torch.long)
    if "high_res_pixel_values" in names:
        second: Any = next(module for name, module in base.named_children() if name.startswith("high_res"))
        size = second.config.image_size
        extras["high_res_pixel_values"] = torch.Size((2, 3, size, size))
    return extras


def _packed(encoder: nn.Module, spec: EncoderSpec, names: set[str]) -> Iterator[dict[str, Any]]:
    """Patches of images one after the other, and the images' grids (Qwen2-VL)."""
    grid_name = next((name for name in ("image_grid_thw", "image_grid_hw") if name in names), None)
    if grid_name is None:
        return
    merge = (
        _number(encoder, spec.merge)
        or _number(encoder, "merge_kernel_size")
        or _number(encoder, "config.merge_size")
        or 2
    )
    grids = torch.tensor([[1, rows * merge, columns * merge] for rows, columns in _SIDES])
    count = int(grids.prod(1).sum())
    if grid_name == "image_grid_hw":
        grids = grids[:, 1:]
    more = {"image_merge_sizes": torch.tensor([merge] * len(_SIDES))} if "image_merge_sizes" in names else {}
    for shape in _patch_shapes(encoder):
        yield {"pixel_values": torch.Size((count, *shape)), grid_name: grids, **more}


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


def _strip(encoder: nn.Module, spec: EncoderSpec, names: set[str]) -> Iterator[dict[str, Any]]:
    """The patches of all images side by side in one strip, and the images' grids (MiniCPM-V)."""
    patch = _number(encoder, "config.patch_size")
    if "target_sizes" not in names or patch is None:
        return
    sizes = torch.tensor([[rows * 2, columns * 2] for rows, columns in _SIDES])
    yield {"pixel_values": torch.Size((1, 3, patch, patch * int(sizes.prod(1).sum()))), "target_sizes": sizes}


def _placed(encoder: nn.Module, spec: EncoderSpec, names: set[str]) -> Iterator[dict[str, Any]]:
    """Padded sequences of patches and the place (x, y) of each, -1 for padding (Gemma 4)."""
    if "image_position_ids" not in names:
        return
    side = _number(encoder, "config.pooling_kernel_size") or 1
    grids = [(rows * side, columns * side) for rows, columns in _SIDES]
    longest = max(rows * columns for rows, columns in grids)
    places = torch.full((len(grids), longest, 2), -1)
    for number, (rows, columns) in enumerate(grids):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places[number, : rows * columns] = torch.stack([x, y], dim=-1).flatten(0, 1)
    for shape in _patch_shapes(encoder):
        yield {"pixel_values": torch.Size((len(grids), longest, *shape)), "image_position_ids": places}


def _square(encoder: nn.Module, spec: EncoderSpec, names: set[str]) -> Iterator[dict[str, Any]]:
    """Square images, each by itself or as the only tile of a sample."""
    if not {"pixel_values", "pixel_values_images"} & names or _SIZED & names:
        return
    size = _size(encoder, spec) or _ANY_SIZE
    name = "pixel_values_images" if "pixel_values_images" in names else "pixel_values"
    more: dict[str, Any] = {}
    if "image_sizes" in names:
        more = {"image_sizes": torch.tensor([size] * 2)}
    yield {name: torch.Size((2, 3, *size)), **more}
    if more:
        yield {name: torch.Size((2, 3, *size))}
    yield {name: torch.Size((1, 2, 3, *size)), **more}
    if "pixel_attention_mask" in names:
        yield {name: torch.Size((1, 2, 3, *size)), "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool)}


_FORMS = (_packed, _sized, _padded, _strip, _placed, _square)


def _patch_shapes(encoder: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes that one patch may have, by the encoder's patch embedding."""
    modules = list(encoder.modules())
    for module in modules:
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            yield (module.in_channels * math.prod(module.kernel_size),)
            yield (module.in_channels, *module.kernel_size)
            break
    for module in modules:
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
