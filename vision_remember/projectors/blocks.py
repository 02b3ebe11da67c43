"""Blocks of cells for projectors that need every token to stand for s_h x s_w whole cells."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import Grid

Fit = Literal["error", "pad", "resize"]


def block_shape(grid: Grid, out_grid: Grid, fit: Fit) -> Grid:
    """Cells (rows, columns) per token.

    Args:
        grid: (H, W) of the features.
        out_grid: (h, w) of the tokens.
        fit: what to do where the one does not divide the other: "error"; "pad", repeat the last rows and columns;
            "resize", interpolate the features bilinearly.

    Raises:
        ValueError: the grids do not divide and ``fit`` is "error", or it is no known policy.
    """
    if fit not in ("error", "pad", "resize"):
        raise ValueError(f"fit={fit!r}: expected 'error', 'pad' or 'resize'")
    if fit == "error" and (grid[0] % out_grid[0] or grid[1] % out_grid[1]):
        raise ValueError(
            f"features of {grid[0]}x{grid[1]} do not divide into {out_grid[0]}x{out_grid[1]} equal blocks; "
            "choose another grid, or fit='pad' or fit='resize'"
        )
    return -(-grid[0] // out_grid[0]), -(-grid[1] // out_grid[1])


def fitted(features: Tensor, grid: Grid, out_grid: Grid, fit: Fit) -> tuple[Tensor, Grid]:
    """Features on the smallest grid around ``grid`` that divides into ``out_grid`` equal blocks.

    Args:
        features: (B, H*W, C).
        grid: (H, W).
        out_grid: (h, w).
        fit: see :func:`block_shape`.

    Returns:
        (B, C, h*rows, w*columns), and (rows, columns) of a block.
    """
    rows, columns = block_shape(grid, out_grid, fit)
    cells = features.transpose(1, 2).unflatten(2, grid)  # (B, C, H, W)
    size = (out_grid[0] * rows, out_grid[1] * columns)
    if size != grid and fit == "pad":
        cells = F.pad(cells, (0, size[1] - grid[1], 0, size[0] - grid[0]), mode="replicate")
    elif size != grid:
        cells = F.interpolate(cells, size=size, mode="bilinear", align_corners=False)
    return cells, (rows, columns)
