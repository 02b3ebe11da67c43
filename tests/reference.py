"""Local attention once more, from other parts: one masked global attention, its mask read off PyTorch's own pooling."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import Grid


def block_numbers(query_grid: Grid, window: int) -> Tensor:
    """(h*w,), the block that each query belongs to, blocks counted row by row."""
    rows, columns = (torch.arange(side) // window for side in query_grid)
    return (rows[:, None] * math.ceil(query_grid[1] / window) + columns).flatten()


def slot_numbers(query_grid: Grid, window: int) -> Tensor:
    """(h*w,), the place of each query in its block, row by row."""
    rows, columns = (torch.arange(side) % window for side in query_grid)
    return (rows[:, None] * window + columns).flatten()


def visible_cells(query_grid: Grid, key_grid: Grid, window: int = 1) -> Tensor:
    """(h*w, H*W), whether the query's block holds a query for which adaptive average pooling reads the cell."""
    cells = math.prod(key_grid)
    images = torch.eye(cells, dtype=torch.float64).reshape(cells, 1, *key_grid)
    read = F.adaptive_avg_pool2d(images, query_grid).reshape(cells, -1).T > 0
    blocks = block_numbers(query_grid, window)
    together = blocks[:, None] == blocks
    return (together.double() @ read.double()) > 0


def frame(query_grid: Grid, key_grid: Grid, window: int = 1) -> Grid:
    """Rows and columns of the largest region."""
    regions = visible_cells(query_grid, key_grid, window).unflatten(1, key_grid)
    return int(regions.any(2).sum(1).max()), int(regions.any(1).sum(1).max())


def bias_shapes(heads: int, query_grid: Grid, key_grid: Grid, window: int) -> dict[int, tuple[int, ...]]:
    """The two shapes of a bias, by the number of dimensions."""
    cells, blocks = math.prod(frame(query_grid, key_grid, window)), int(block_numbers(query_grid, window).max()) + 1
    return {3: (heads, window**2, cells), 4: (heads, blocks, window**2, cells)}


def global_bias(bias: Tensor, query_grid: Grid, key_grid: Grid, window: int = 1) -> Tensor:
    """(heads, h*w, H*W), the bias of each query and cell; minus infinity where the query does not see the cell."""
    regions = visible_cells(query_grid, key_grid, window).unflatten(1, key_grid)
    width = frame(query_grid, key_grid, window)[1]
    blocks, slots = block_numbers(query_grid, window), slot_numbers(query_grid, window)
    spread = bias.new_full((len(bias), len(regions), math.prod(key_grid)), -math.inf)
    for query, region in enumerate(regions):
        y, x = region.nonzero(as_tuple=True)
        places = (y - y.min()) * width + (x - x.min())
        table = bias[:, slots[query]] if bias.ndim == 3 else bias[:, blocks[query], slots[query]]
        spread[:, query, y * key_grid[1] + x] = table[:, places]
    return spread


def masked_global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_grid: Grid,
    key_grid: Grid,
    window: int = 1,
    saliency: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """What ``local_attention`` has to return, with the same arguments."""
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    if bias is None:
        hidden = ~visible_cells(query_grid, key_grid, window)
        logits = logits.masked_fill(hidden, -math.inf)
    else:
        logits = logits + global_bias(bias, query_grid, key_grid, window)
    weights = logits.softmax(-1)
    if saliency is not None:
        weights = weights * saliency[:, None, None]
    return torch.einsum("bhqk,bhkd->bhqd", weights, value)
