"""How the cells of a batch stand in an encoder's hidden state, and how to set them in raster order, tile by tile.

Orders, for a hidden state of B or one sequence:

- "raster": (B, prefix + H*W, C) or (B, H, W, C), all tiles of one grid.
- "channels_first": (B, C, H, W).
- "packed": (N, C) or (1, N, C), the rasters of all tiles one after the other, each of its own grid, perhaps with prefix
  tokens in front.
- "blocks": packed, but each tile is a raster of blocks of m x m cells, block by block (Qwen2-VL).
- "windows": blocks, but each tile is a raster of windows of blocks, window by window (Qwen2.5-VL).
- "padded": (B, L, C), each tile's raster at the front of its row (SigLIP 2 NaFlex).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.encoder import EncoderSpec, find
from vision_remember.grid import Grid, check_length, square_grid


@dataclass(frozen=True)
class Group:
    """Tiles of one size.

    Attributes:
        numbers: their places among all tiles of the call.
        grid: (H, W).
    """

    numbers: tuple[int, ...]
    grid: Grid


@dataclass(frozen=True)
class Arrangement:
    """Where the cells of each tile stand in the hidden states of one run of the encoder.

    Attributes:
        groups: the tiles by size.
        starts: first position of each tile in its sequence.
        packed: whether the tiles share one sequence.
        order: for each tile, (H*W,) the places of its cells in raster order, counted from its start; None where they
            stand in raster order.
    """

    groups: tuple[Group, ...]
    starts: tuple[int, ...]
    packed: bool
    order: tuple[Tensor, ...] | None = None

    def split(self, hidden: Tensor) -> list[Tensor]:
        """The cells of a hidden state, one (T, H*W, C) per group, raster order."""
        if hidden.ndim == 4:
            hidden = hidden.flatten(1, 2)
        if self.packed:
            sequence = hidden.reshape(-1, hidden.shape[-1])
            return [torch.stack([self._tile(sequence, n, group.grid) for n in group.numbers]) for group in self.groups]
        if len(self.groups) == 1:
            start, (height, width) = self.starts[0], self.groups[0].grid
            return [hidden[:, start : start + height * width]]
        return [torch.stack([self._tile(hidden[n], n, group.grid) for n in group.numbers]) for group in self.groups]

    def _tile(self, sequence: Tensor, number: int, grid: Grid) -> Tensor:
        start = self.starts[number]
        cells = sequence[start : start + grid[0] * grid[1]]
        return cells if self.order is None else cells[self.order[number].to(cells.device)]


def arrange(
    encoder: nn.Module, spec: EncoderSpec, hidden: Tensor, arguments: Mapping[str, Any], patch_grid: Grid | None
) -> Arrangement:
    """The arrangement of one run.

    Args:
        encoder: that ran.
        spec: its spec.
        hidden: a hidden state of the run; a map has its channels last.
        arguments: of the encoder's forward, by name.
        patch_grid: (H, W) of the patch embedding's output, if that tells it.

    Raises:
        ValueError: the hidden state does not hold the cells that the sizes promise.
    """
    if spec.order in ("raster", "channels_first") and hidden.ndim == 4:
        count, height, width = hidden.shape[:3]
        return _uniform(count, (height, width), 0)
    if spec.order == "raster":
        cells = hidden.shape[1] - spec.prefix_tokens - (spec.cls_token == -1)
        grid = patch_grid or square_grid(cells)
        check_length("a hidden state", cells, "the patch grid", grid)
        return _uniform(hidden.shape[0], grid, spec.prefix_tokens)
    grids = _grids(encoder, spec, arguments)
    by_size: dict[Grid, list[int]] = {}
    for number, grid in enumerate(grids):
        by_size.setdefault(grid, []).append(number)
    groups = tuple(Group(tuple(numbers), grid) for grid, numbers in by_size.items())
    if spec.order == "padded":
        return Arrangement(groups, (0,) * len(grids), packed=False)
    counts = [spec.prefix_tokens + height * width for height, width in grids]
    if hidden.numel() // hidden.shape[-1] != sum(counts):
        raise ValueError(
            f"{type(encoder).__name__} made {hidden.numel() // hidden.shape[-1]} cells, but {spec.sizes} says "
            f"{sum(counts)} ({', '.join(f'{h}x{w}' for h, w in grids[:4])}{', ...' if len(grids) > 4 else ''})"
        )
    starts = tuple(spec.prefix_tokens + start for start in [0, *accumulate(counts)][:-1])
    if spec.order == "packed":
        return Arrangement(groups, starts, packed=True)
    orders = {grid: _order(encoder, spec, grid) for grid in by_size}
    return Arrangement(groups, starts, packed=True, order=tuple(orders[grid] for grid in grids))


def _uniform(count: int, grid: Grid, start: int) -> Arrangement:
    return Arrangement((Group(tuple(range(count)), grid),), (start,) * count, packed=False)


def _grids(encoder: nn.Module, spec: EncoderSpec, arguments: Mapping[str, Any]) -> list[Grid]:
    """(H, W) of each tile; a video's frames are tiles."""
    assert spec.sizes is not None
    sizes = arguments.get(spec.sizes)
    if sizes is None:
        raise ValueError(f"{type(encoder).__name__} ran without {spec.sizes}, which tells the images' sizes")
    if isinstance(sizes, Tensor) and sizes.ndim == 3:
        sizes = sizes.amax(1).flip(-1) + 1  # the last cell's place (x, y)
    rows: Sequence[Sequence[int]] = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    unit = _number(encoder, spec.size_unit) if spec.size_unit else 1
    grids: list[Grid] = []
    for *frames, height, width in rows:
        grids += [(int(height) // unit, int(width) // unit)] * math.prod(map(int, frames))
    return grids


def _order(encoder: nn.Module, spec: EncoderSpec, grid: Grid) -> Tensor:
    """(H*W,), for each cell in raster order its place in a tile that stands in blocks, and these perhaps in windows."""
    merge = _number(encoder, spec.merge)
    window = 0
    if spec.order == "windows":
        assert spec.window_size is not None
        assert spec.patch_size is not None
        window = _number(encoder, spec.window_size) // _number(encoder, spec.patch_size) // merge
    return block_order(grid, merge, window)


def block_order(grid: Grid, merge: int, window: int = 0) -> Tensor:
    """For each cell of a raster, its place where blocks of ``merge`` x ``merge`` cells stand together.

    Args:
        grid: (H, W).
        merge: side of a block in cells.
        window: side of a window in blocks: blocks of one window stand together; 0 for no windows.

    Raises:
        ValueError: the blocks do not fill the grid.
    """
    height, width = grid
    if height % merge or width % merge:
        raise ValueError(f"a grid of {height}x{width} cells does not consist of blocks of {merge}x{merge}")
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    block, inside = (row // merge, column // merge), (row % merge, column % merge)
    digits = [*block, *inside]
    if window:
        digits = [*(of // window for of in block), *(of % window for of in block), *inside]
    key = torch.zeros_like(row)
    for digit in digits:
        key = key * max(height, width) + digit
    return key.flatten().argsort().argsort()


def _number(encoder: nn.Module, path: str | int) -> int:
    value = find(encoder, path) if isinstance(path, str) else path
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise ValueError(f"{type(encoder).__name__}.{path} is {value!r}: expected a whole number")
    return value
