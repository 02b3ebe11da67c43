"""Blocks of cells, for projectors that join the features of rows x columns whole cells into one token."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import Grid, check_grid
from vision_remember.projectors.base import Projector

Fit = Literal["error", "pad", "resize"]
Order = Literal["block_major", "channel_major"]


def check_blocks(grid: Grid, out_grid: Grid, block: Grid, fit: Fit) -> None:
    """Raises ValueError unless ``fit`` can bring features of ``grid`` to ``out_grid`` blocks of ``block`` cells.

    "pad" repeats the last rows and columns, but makes no token of repetitions alone; "resize" takes any grid.
    """
    size = out_grid[0] * block[0], out_grid[1] * block[1]
    missing = size[0] - grid[0], size[1] - grid[1]
    padded = 0 <= missing[0] < block[0] and 0 <= missing[1] < block[1]
    if fit == "resize" or missing == (0, 0) or (fit == "pad" and padded):
        return
    ways = "another grid or block, or fit='resize'" if fit == "pad" or not padded else "fit='pad' or fit='resize'"
    raise ValueError(
        f"out_grid={out_grid[0]}x{out_grid[1]} of {block[0]}x{block[1]} blocks covers {size[0]}x{size[1]} cells, "
        f"but the features' grid is {grid[0]}x{grid[1]}; choose {ways}"
    )


def fitted(features: Tensor, grid: Grid, size: Grid, fit: Fit) -> Tensor:
    """(B, H*W, C) on ``grid`` -> (B, C, *size): unchanged, or by ``fit`` where the sizes differ."""
    cells = features.transpose(1, 2).unflatten(2, grid)
    if size == grid:
        return cells
    if fit == "pad":
        return F.pad(cells, (0, size[1] - grid[1], 0, size[0] - grid[0]), mode="replicate")
    return F.interpolate(cells, size=size, mode="bilinear", align_corners=False)


def space_to_depth(cells: Tensor, block: Grid, order: Order) -> Tensor:
    """(B, C, h*rows, w*columns) -> (B, h*w, rows*columns*C): each block's cells on channels; a mere permutation.

    Args:
        cells: the features as an image.
        block: (rows, columns).
        order: the channel of feature ``c`` of the block's cell ``k`` (row by row): ``k * C + c`` for "block_major", the
            concatenation of the cells; ``c * rows * columns + k`` for "channel_major", as ``torch.pixel_unshuffle``.
    """
    blocks = cells.unflatten(3, (-1, block[1])).unflatten(2, (-1, block[0]))  # (B, C, h, rows, w, columns)
    axes = (0, 2, 4, 3, 5, 1) if order == "block_major" else (0, 2, 4, 1, 3, 5)
    return blocks.permute(axes).flatten(3).flatten(1, 2)


class BlockProjector(Projector):
    """Base of projectors whose weights fix how many cells make a token.

    Args:
        in_dim: C, width of one level.
        out_dim: D, width of the decoder.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio.
        block: cells (rows, columns) per token; None for the root of the ratio, or 2x2 where ``out_grid`` is fixed.
        fit: what to do with features whose grid is not ``out_grid * block``: "error"; "pad", repeat the last rows and
            columns; "resize", interpolate the features bilinearly.

    Raises:
        ValueError: an unknown ``fit``, or a block that is no pair of positive integers.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        block: Grid | None = None,
        fit: Fit = "error",
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid)
        if fit not in ("error", "pad", "resize"):
            raise ValueError(f"fit={fit!r}: expected 'error', 'pad' or 'resize'")
        if block is not None:
            check_grid("block", block)
        side = math.isqrt(ratio or 1) if out_grid is None else 2
        self.block: Grid = (side, side) if block is None else (block[0], block[1])
        self.fit: Fit = fit

    def options(self) -> dict[str, Any]:
        return {**super().options(), "block": self.block, "fit": self.fit}

    def out_grid(self, grid: Grid) -> Grid:
        out_grid = super().out_grid(grid)
        check_blocks(grid, out_grid, self.block, self.fit)
        return out_grid

    def joined(self, features: Tensor, grid: Grid, out_grid: Grid, order: Order) -> Tensor:
        """(B, H*W, C) -> (B, h*w, rows*columns*C); see :func:`space_to_depth`."""
        size = out_grid[0] * self.block[0], out_grid[1] * self.block[1]
        return space_to_depth(fitted(features, grid, size, self.fit), self.block, order)
