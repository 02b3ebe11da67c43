"""Grids: how a raster of vision tokens lies over a raster of encoder cells."""

from __future__ import annotations

import math

Grid = tuple[int, int]
"""(rows, columns) of a raster; position (i, j) is element ``i * columns + j`` of a flattened sequence."""


def check_count(name: str, value: object, *, lowest: int = 1) -> None:
    """Raises ValueError unless ``value`` is a whole number, ``lowest`` or more; ``name`` is for the message."""
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        expected = "a positive whole number" if lowest == 1 else f"a whole number, {lowest} or more"
        raise ValueError(f"{name}={value!r}: expected {expected}")


def count_or(name: str, value: int | None, default: int) -> int:
    """``value``, or ``default`` for None; raises ValueError unless it is a positive whole number."""
    if value is None:
        return default
    check_count(name, value)
    return value


def check_grid(name: str, grid: Grid) -> None:
    """Raises ValueError unless ``grid`` is a pair of positive whole numbers; ``name`` is for the message."""
    if (
        not isinstance(grid, (tuple, list))
        or len(grid) != 2
        or not all(isinstance(side, int) and side > 0 for side in grid)
    ):
        raise ValueError(f"{name}={grid!r}: expected a pair (rows, columns) of positive integers")


def check_length(name: str, length: int, grid_name: str, grid: Grid) -> None:
    """Raises ValueError unless a raster sequence of ``length`` elements fills ``grid``."""
    if length != grid[0] * grid[1]:
        raise ValueError(
            f"{name} holds {length} positions, but {grid_name}={grid[0]}x{grid[1]} has {grid[0] * grid[1]}"
        )


def square_grid(length: int) -> Grid:
    """The square grid of ``length`` cells.

    Raises:
        ValueError: ``length`` is no square; the grid must then be given.
    """
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"{length} cells do not form a square grid; pass the grid as (rows, columns)")
    return side, side


def region(start: int, stop: int, tokens: int, cells: int) -> tuple[int, int]:
    """Cells under the tokens ``start..stop-1`` of one axis, as a half-open range.

    This is adaptive average pooling's rule: cells ``floor(start * cells / tokens) .. ceil(stop * cells / tokens) - 1``.
    It is never empty, covers every cell, and reduces to equal blocks when ``cells`` is a multiple of ``tokens``.
    """
    return start * cells // tokens, -(-stop * cells // tokens)


def token_grid_over(grid: Grid, tokens: int) -> Grid | None:
    """The grid of ``tokens`` that lies over a grid of cells with as many cells per row as per column of a token.

    None if no such grid exists. Where the cells do not divide evenly, a square grid over a square one will do.
    """
    height, width = grid
    side = math.isqrt(height * width // tokens) if tokens else 0
    if side and height % side == 0 and width % side == 0 and (height // side) * (width // side) == tokens:
        return height // side, width // side
    root = math.isqrt(tokens)
    return (root, root) if height == width and root * root == tokens and 0 < root <= height else None
