"""Local attention by blocks: every block of queries and its region become one small dense attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import Grid
from vision_remember.ops.regions import AxisRegions


def windowed_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_grid: Grid,
    key_grid: Grid,
    key_levels: int = 1,
    window: int = 1,
    saliency: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See :func:`vision_remember.ops.local_attention`; the arguments are taken as already checked.

    On grids that divide evenly the blocks are views of the raster. Otherwise the regions differ in size and overlap:
    they are gathered into frames as large as the largest region, and the cells beyond a region are masked.
    """
    rows, columns = (AxisRegions(*sides, window) for sides in zip(query_grid, key_grid, strict=True))
    if saliency is not None:
        value = value * saliency[:, None, :, None]

    query = _split_queries(query, query_grid, window, rows, columns)  # (B, heads, blocks, k*k, d)
    key = _split_cells(key, key_grid, key_levels, rows, columns)  # (B, heads, blocks, levels*cells, d)
    value = _split_cells(value, key_grid, key_levels, rows, columns)

    logits = torch.matmul(
        query / math.sqrt(query.shape[-1]), key.transpose(-1, -2)
    )  # (B, heads, blocks, k*k, levels*cells)
    if bias is not None:
        logits = logits + (bias.unsqueeze(1) if bias.ndim == 3 else bias)
    if not (rows.even and columns.even):
        inside = rows.inside(key.device)[:, None, :, None] & columns.inside(key.device)[None, :, None, :]
        inside = inside.reshape(rows.blocks * columns.blocks, 1, -1).repeat(1, 1, key_levels)
        logits = logits.masked_fill(~inside, -math.inf)
    # Half precision keeps too few digits for a sum of exponentials.
    weights = logits.softmax(-1, dtype=torch.float32 if logits.dtype.itemsize < 4 else None).to(value.dtype)
    return _merge_queries(torch.matmul(weights, value), query_grid, window, rows, columns)


def _split_queries(x: Tensor, grid: Grid, window: int, rows: AxisRegions, columns: AxisRegions) -> Tensor:
    """(B, heads, h*w, d) -> (B, heads, blocks, k*k, d); a smaller last block is filled up with zeros."""
    batch, heads, _, dim = x.shape
    x = x.reshape(batch, heads, *grid, dim)
    missing_rows, missing_columns = rows.blocks * window - grid[0], columns.blocks * window - grid[1]
    if missing_rows or missing_columns:
        x = F.pad(x, (0, 0, 0, missing_columns, 0, missing_rows))
    x = x.reshape(batch, heads, rows.blocks, window, columns.blocks, window, dim).transpose(3, 4)
    return x.reshape(batch, heads, rows.blocks * columns.blocks, window * window, dim)


def _merge_queries(x: Tensor, grid: Grid, window: int, rows: AxisRegions, columns: AxisRegions) -> Tensor:
    """The inverse of :func:`_split_queries`."""
    batch, heads, _, _, dim = x.shape
    x = x.reshape(batch, heads, rows.blocks, columns.blocks, window, window, dim).transpose(3, 4)
    x = x.reshape(batch, heads, rows.blocks * window, columns.blocks * window, dim)
    return x[:, :, : grid[0], : grid[1]].reshape(batch, heads, grid[0] * grid[1], dim)


def _split_cells(x: Tensor, grid: Grid, levels: int, rows: AxisRegions, columns: AxisRegions) -> Tensor:
    """(B, heads, levels*H*W, d) -> (B, heads, blocks, levels*cells, d), the cells of each region row by row."""
    batch, heads, _, dim = x.shape
    if rows.even and columns.even:
        x = x.reshape(batch, heads, levels, rows.blocks, rows.extent, columns.blocks, columns.extent, dim)
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)
    else:
        index = rows.cells(x.device)[:, None, None, :, None] * grid[1] + columns.cells(x.device)[None, :, None, None, :]
        index = index + torch.arange(levels, device=x.device)[:, None, None] * (grid[0] * grid[1])
        x = x.index_select(2, index.flatten())
    return x.reshape(batch, heads, rows.blocks * columns.blocks, levels * rows.extent * columns.extent, dim)
