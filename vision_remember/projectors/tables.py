"""Learned tables over a grid: queries and positions that serve grids of other sizes as well."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import Grid, check_grid

DEFAULT_QUERY_GRID: Grid = (12, 12)


def resampled(table: Tensor, grid: Grid, target: Grid) -> Tensor:
    """(h*w, E) learned on ``grid`` -> the same table on ``target``, bicubic; the very table where the grids agree."""
    if grid == target:
        return table
    raster = table.T.unflatten(1, grid).unsqueeze(0)  # (1, E, h, w)
    return F.interpolate(raster, size=target, mode="bicubic", align_corners=False).flatten(2)[0].T


def learned_query_grid(query_grid: Grid | None, out_grid: Grid | None) -> Grid:
    """The grid that learned queries are laid out for: the one asked for, else that of the tokens if fixed, else 12x12.

    Raises:
        ValueError: no pair of positive integers.
    """
    chosen = next(grid for grid in (query_grid, out_grid, DEFAULT_QUERY_GRID) if grid is not None)
    check_grid("query_grid", chosen)
    return chosen[0], chosen[1]
