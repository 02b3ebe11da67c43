"""Which image token stands for which part of the image: read off the host's own packing, never guessed.

Hosts stitch tiles together, drop padding and put newlines between rows. All that happens in their
``get_image_features`` after the projector. So that code is run once more, on a stand-in for the host whose encoder
returns what it returned before, whose projector returns each token's number, and whose newlines are -1: what comes out
tells where every token went.
"""

from __future__ import annotations

import copy
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.adapters.tokens import image_tokens
from vision_remember.grid import Grid

_NOWHERE = -1
_SAME = 1e-6


@dataclass(frozen=True)
class Packing:
    """How a host packed the tokens of its tiles.

    Attributes:
        slots: (R,) on the CPU, for each image token its number among the tokens of all tiles; -1 for a newline.
        tiles: tiles of each image.
        token_grid: (h, w) of the tokens of a tile, where the host resamples them after the projector; else None.
    """

    slots: Tensor
    tiles: list[int]
    token_grid: Grid | None = None


def trace_packing(
    base: nn.Module,
    method: Callable[..., Any],
    recorded: tuple[dict[str, Any], str],
    token_grid: Grid,
    *args: Any,
    **kwargs: Any,
) -> Packing:
    """The packing of one call of an encoding method.

    Where the host blends tokens (it shrinks the stitched tiles of a large image, say), a blend stands for the token
    that lies nearest. Where blends are a smaller raster over each tile, they are the tile's tokens.

    Args:
        base: the module that the method belongs to.
        method: the method, not bound.
        recorded: what ``base``'s children returned in the call, by attribute: the encoder's output and the projector's,
            (T, n, D); and which of them is the projector.
        token_grid: (h, w) of the n tokens.
        *args: of the call.
        **kwargs: of the call.

    Raises:
        ValueError: several image tokens stand for the same part of the image.
    """
    projected: Tensor = recorded[0][recorded[1]]
    tiles, per_tile, _ = projected.shape

    def packed(traces: Tensor) -> list[Tensor]:
        return _packed(base, method, recorded, traces, *args, **kwargs)

    # float64 is exact for any number of tokens and survives code that is made for features. A number that comes out
    # with its square is whole: of a blend, the square is not the mean of the squares.
    numbers = torch.arange(tiles * per_tile, dtype=torch.float64, device=projected.device).view(tiles, per_tile, 1)
    images = packed(torch.cat([numbers, numbers**2], dim=-1))
    slots, squares = torch.cat(images).unbind(-1)
    if torch.equal(squares.where(slots != _NOWHERE, slots**2), slots**2):
        packing = Packing(slots.long(), _tiles_per_image([image[:, 0] // per_tile for image in images], tiles))
    else:
        packing = _blended(packed, projected, token_grid)
    inside = packing.slots[packing.slots != _NOWHERE]
    if len(inside.unique()) < len(inside):
        raise ValueError(
            f"{type(base).__name__} repeats image tokens where it packs them, so that several stand for one part of "
            "the image; Vision Remember cannot follow it"
        )
    return packing


def _packed(
    base: nn.Module,
    method: Callable[..., Any],
    recorded: tuple[dict[str, Any], str],
    traces: Tensor,
    *args: Any,
    **kwargs: Any,
) -> list[Tensor]:
    """What becomes of (T, n, K) ``traces`` put for the projector's output: (tokens, K) of each image, on the CPU."""
    returned, projector = recorded
    stand_in = _StandIn(base)
    for name, value in {**returned, projector: traces}.items():
        owner, _, _ = name.partition(".")
        module = getattr(base, owner)
        if owner == name:
            setattr(stand_in, name, _Returning(value, module))
        else:
            _replace_lists(stand_in, base, base.get_submodule(name), value)
    width = returned[projector].shape[-1]
    for name, parameter in base.named_parameters(recurse=False):
        if parameter.shape == (width,):  # put between tokens, as long as a token: a newline
            setattr(stand_in, name, traces.new_full((traces.shape[-1],), _NOWHERE))
    with torch.no_grad():
        output = method(stand_in, *args, **kwargs)
    return [image.cpu() for image in image_tokens(output)]


def _blended(packed: Callable[[Tensor], list[Tensor]], projected: Tensor, token_grid: Grid) -> Packing:
    """The packing where tokens are blends of the projector's."""
    tiles, (height, width) = len(projected), token_grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([torch.ones_like(rows), rows, columns], dim=-1).view(-1, 3).to(projected.device, torch.float64)
    # For each tile its share in a token, and its share times row and column.
    own = torch.eye(tiles, dtype=torch.float64, device=projected.device)
    traces = torch.einsum("tu,nk->tnuk", own, place).flatten(2)
    images = [image.unflatten(-1, (tiles, 3)) for image in packed(traces)]
    tokens = torch.cat(images)
    newline = (tokens == _NOWHERE).flatten(1).all(1)
    tile = tokens[..., 0].argmax(-1)
    share, row, column = tokens[torch.arange(len(tokens)), tile].unbind(-1)
    owners = [tile[newline.logical_not() & at] for at in _of_each(images)]
    counts = _tiles_per_image(owners, tiles)
    grid = _resampled_grid(tile[~newline], share[~newline], row[~newline], tiles)
    if grid is not None:
        slots = torch.full((len(tokens),), _NOWHERE)
        slots[~newline] = torch.arange(int((~newline).sum()))
        return Packing(slots, counts, grid)
    nearest = (tile * height + (row / share).round().long()) * width + (column / share).round().long()
    return Packing(nearest.masked_fill(newline, _NOWHERE), counts)


def _resampled_grid(tile: Tensor, share: Tensor, row: Tensor, tiles: int) -> Grid | None:
    """(h, w) if the tokens are a raster over each tile, tile by tile, and none mixes two tiles; else None."""
    count = len(tile) // tiles
    if not torch.allclose(share, torch.ones_like(share)) or count * tiles != len(tile):
        return None
    if not torch.equal(tile, torch.arange(tiles).repeat_interleave(count)):
        return None
    starts = (row[1:count] > row[: count - 1] + _SAME).sum() + 1
    height = int(starts)
    return (height, count // height) if count % height == 0 else None


def _of_each(images: list[Tensor]) -> Iterator[Tensor]:
    """For each image, where its tokens stand among those of all."""
    number = torch.arange(len(images)).repeat_interleave(torch.tensor([len(image) for image in images]))
    for image in range(len(images)):
        yield number == image


def _tiles_per_image(owners: list[Tensor], tiles: int) -> list[int]:
    """Tiles follow the order of the images: an image ends with the tile of its last token, the last image with all.

    Args:
        owners: for each image, the tiles of its tokens.
        tiles: T.
    """
    stops = [int(image.max()) + 1 for image in owners[:-1]] + [tiles]
    return [stop - start for start, stop in zip([0, *stops], stops, strict=False)]


def _replace_lists(stand_in: Any, base: nn.Module, projector: nn.Module, value: Tensor) -> None:
    """A host with a list of projectors packs the tokens of each alike: all return the value."""
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList) and any(type(module) is type(projector) for module in child):
            setattr(stand_in, name, [_Returning(value, module) for module in child])


@contextmanager
def recorded_outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What ``module`` returns in this thread inside the ``with``.

    The hook stays for this one call: a module may be wrapped or copied at any time, and a copy must not take it along.
    """
    outputs: list[Tensor] = []
    thread = threading.get_ident()

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        if threading.get_ident() == thread:
            outputs.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


class _StandIn:
    """Looks like a module to its own methods, but for the attributes set on it."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._base, name)
        if inspect.ismethod(value) and value.__self__ is self._base:
            return types.MethodType(value.__func__, self)
        return value


class _Returning:
    """Looks like a module, but returns one value whatever it is called with."""

    def __init__(self, value: Any, module: nn.Module) -> None:
        self._value = value
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A fresh object each time: hosts write their result into the encoder's output.
        return copy.copy(self._value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
