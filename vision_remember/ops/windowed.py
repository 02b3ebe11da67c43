"""Local attention by blocks: every block of queries and its region become one small dense attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import Grid
from vision_remember.ops.one_query import attend_one_query, attend_without_gradients, is_plain, softmax
from vision_remember.ops.regions import AxisRegions

# CUDA's fused kernels take the batch for a dimension of their launch grid, which ends here; before torch 2.10 they took
# no empty one. The backward pass of the one for half precision without a bias counts channels, of 128 queries a region
# and 32 a head at least, in 32 bits.
_LARGEST_FUSED_BATCH = 65535
_LARGEST_FUSED_BACKWARD = 1 << 31


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
    even, heads, blocks = rows.even and columns.even, query.shape[1], rows.blocks * columns.blocks
    if saliency is not None:
        value = value * saliency.unsqueeze(1).unsqueeze(-1)

    # (B*blocks, heads, k*k, d) and (B*blocks, heads, levels*cells, d)
    query = _split_queries(query, query_grid, window, rows, columns)
    key = _split_cells(key, key_grid, key_levels, rows, columns)
    value = _split_cells(value, key_grid, key_levels, rows, columns)

    if not even:
        inside = rows.inside(key.device)[:, None, :, None] & columns.inside(key.device)[None, :, None, :]
        inside = inside.reshape(blocks, 1, -1).repeat(1, 1, key_levels)
        mask = torch.zeros((), dtype=query.dtype, device=key.device).where(inside, -math.inf)
        bias = mask.expand(heads, -1, query.shape[2], -1) if bias is None else mask + bias
    if bias is not None and bias.ndim == 4:
        bias = bias.transpose(0, 1).repeat(query.shape[0] // blocks, 1, 1, 1)
    read = attend_regions(query, key, value, bias, per_image=blocks)
    return _merge_queries(read, query_grid, window, rows, columns)


def attend_regions(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, per_image: int | None = None
) -> Tensor:
    """Dense attention inside each of many small regions, in the form that was measured fastest for the case.

    Args:
        query: (R, heads, q, d).
        key: (R, heads, n, d).
        value: (R, heads, n, d_v).
        bias: added to the logits, (heads, q, n) or (R, heads, q, n).
        per_image: regions of one image, R if not given. Those of different images are never computed together: a number
            that is not finite stays in its image.

    Returns:
        (R, heads, q, d_v); heads stand last but one in memory, as in the queries that projections make.
    """
    on_cpu = query.device.type == "cpu"
    # A CPU's fused attention knows no gradient of a mask and no second ones; under autocast it would narrow what sums
    # of products leave wide.
    fused = on_cpu and not (torch.is_grad_enabled() or (bias is not None and torch.is_autocast_enabled("cpu")))
    if fused and is_plain(query, key, value, *([] if bias is None else [bias])):
        return attend_without_gradients(query, key, value, bias, per_image=per_image or query.shape[0])
    if _fused_takes(query, bias) if query.is_cuda else bias is None:
        return F.scaled_dot_product_attention(query, key, value, bias)
    scale = 1 / math.sqrt(query.shape[-1])
    if query.shape[2] == 1 and on_cpu and bias is not None:
        return attend_one_query(query * scale, key, value, bias)
    logits = torch.matmul(query * scale, key.transpose(-1, -2))
    return torch.matmul(softmax(logits if bias is None else logits + bias, -1), value)


def _fused_takes(query: Tensor, bias: Tensor | None) -> bool:
    """Whether a GPU's fused kernels can run, for (R, heads, q, d) queries."""
    regions, heads, queries, dim = query.shape
    if not 0 < regions <= _LARGEST_FUSED_BATCH:
        return False
    if not torch.is_grad_enabled() or query.dtype.itemsize > 2 or bias is not None:
        return True
    return regions * heads * (-(-queries // 128) * 128) * max(dim, 32) <= _LARGEST_FUSED_BACKWARD


def to_regions(x: Tensor, rows: AxisRegions, columns: AxisRegions) -> Tensor:
    """(B, H*W, C) in raster order -> (B, rows, columns, cells per row, cells per column, C), a view.

    Only for axes that divide evenly. Flattened, the cells of a region stand together, row by row.
    """
    x = x.unflatten(1, (rows.blocks, rows.extent, columns.blocks, columns.extent))
    return x.transpose(2, 3)


def split_query_blocks(x: Tensor, grid: Grid, window: int) -> Tensor:
    """(B, heads, h*w, d) -> (B*blocks, heads, k*k, d), for a window that divides the grid."""
    rows, columns = (AxisRegions(side, side, window) for side in grid)
    return _split_queries(x, grid, window, rows, columns)


def merge_query_blocks(x: Tensor, grid: Grid, window: int) -> Tensor:
    """The inverse of :func:`split_query_blocks`."""
    rows, columns = (AxisRegions(side, side, window) for side in grid)
    return _merge_queries(x, grid, window, rows, columns)


def _split_queries(x: Tensor, grid: Grid, window: int, rows: AxisRegions, columns: AxisRegions) -> Tensor:
    """(B, heads, h*w, d) -> (B*blocks, heads, k*k, d); a smaller last block is filled up with zeros."""
    batch, heads, _, dim = x.shape
    x = x.transpose(1, 2)
    if window > 1:
        x = x.unflatten(1, grid)
        missing_rows, missing_columns = rows.blocks * window - grid[0], columns.blocks * window - grid[1]
        if missing_rows or missing_columns:
            x = F.pad(x, (0, 0, 0, 0, 0, missing_columns, 0, missing_rows))
        x = x.reshape(batch, rows.blocks, window, columns.blocks, window, heads, dim).transpose(2, 3)
    return x.reshape(batch * rows.blocks * columns.blocks, window * window, heads, dim).transpose(1, 2)


def _merge_queries(x: Tensor, grid: Grid, window: int, rows: AxisRegions, columns: AxisRegions) -> Tensor:
    """The inverse of :func:`_split_queries`."""
    _, heads, _, dim = x.shape
    batch = x.shape[0] // (rows.blocks * columns.blocks)
    x = x.transpose(1, 2)
    if window > 1:
        x = x.reshape(batch, rows.blocks, columns.blocks, window, window, heads, dim).transpose(2, 3)
        x = x.reshape(batch, rows.blocks * window, columns.blocks * window, heads, dim)
        x = x.narrow(1, 0, grid[0]).narrow(2, 0, grid[1])
    return x.reshape(batch, grid[0] * grid[1], heads, dim).transpose(1, 2)


def _split_cells(x: Tensor, grid: Grid, levels: int, rows: AxisRegions, columns: AxisRegions) -> Tensor:
    """(B, heads, levels*H*W, d) -> (B*blocks, heads, levels*cells, d), the cells of each region row by row."""
    batch, heads, _, dim = x.shape
    x = x.transpose(1, 2)
    if rows.even and columns.even:
        x = x.reshape(batch, levels, rows.blocks, rows.extent, columns.blocks, columns.extent, heads, dim)
        x = x.permute(0, 2, 4, 1, 3, 5, 6, 7)
    else:
        index = rows.cells(x.device)[:, None, None, :, None] * grid[1] + columns.cells(x.device)[None, :, None, None, :]
        index = index + torch.arange(levels, device=x.device)[:, None, None] * (grid[0] * grid[1])
        x = x.index_select(1, index.flatten())
    blocks, cells = rows.blocks * columns.blocks, rows.extent * columns.extent
    return x.reshape(batch * blocks, levels * cells, heads, dim).transpose(1, 2)
