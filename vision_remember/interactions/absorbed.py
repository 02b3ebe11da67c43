"""Attention that never projects a cell: its key and value projections move to the other side of the products.

A head's logits are ``(q Wk) F^T`` as well as ``q (F Wk^T)^T``, and its reading is ``((p s) F) Wv^T`` as well as
``p (s F Wv^T)``. A region has fewer queries than cells, so projecting queries and readings costs less than projecting
cells. This holds for attention in regions alone: where each query sees every cell, its products with all of F would
cost more than they save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vision_remember.ops.one_query import is_plain

# What the projected queries of a group of heads may take: of the size of a second-level cache, where it was fastest.
_BUFFER_BYTES = 8 << 20


def pays_off(queries: int, cells: int, head_dim: int) -> bool:
    """Whether at most half of the multiplications remain: the rest of the time goes into moving what is projected.

    Args:
        queries: q of each region.
        cells: n of each region.
        head_dim: d.
    """
    return queries * (1 / cells + 1 / head_dim) <= 0.5


def absorbed_attention(
    query: Tensor,
    levels: Sequence[Tensor],
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    saliency: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same as projecting cells to keys and values and attending to them.

    Args:
        query: (R, heads, q, d).
        levels: one (R, n, c) per level.
        key_weight: (heads*d, C), C the widths of all levels.
        value_weight: (heads*d_v, C).
        saliency: (R, n), multiplies the values.
        bias: (heads, q, n), added to the logits.

    Returns:
        (R, heads, q, d_v).
    """
    regions, heads, queries, dim = query.shape
    widths = [level.shape[-1] for level in levels]
    to_cells = key_weight.unflatten(0, (heads, dim)).to(query.dtype).split(widths, dim=-1)
    from_cells = value_weight.unflatten(0, (heads, -1)).to(query.dtype).transpose(1, 2).split(widths, dim=1)
    # (heads, R*q, d): one product per head with all queries
    rows = (query * (1 / math.sqrt(dim))).permute(1, 0, 2, 3).flatten(1, 2)
    buffer, group = _buffer(query, max(widths), is_plain(query, *levels, *to_cells, *from_cells))
    read = []
    for start in range(0, heads, group):
        part = (0, start, min(group, heads - start))
        logits = None if bias is None else bias.narrow(*part).flatten(0, 1).expand(regions, -1, -1)
        for level, weight in zip(levels, to_cells, strict=True):
            # Queries in the width of a level, and below what was read of it: the largest tensors, one after the other.
            drawn = _product(rows.narrow(*part), weight.narrow(*part), buffer).unflatten(1, (regions, queries))
            logits = _sum(logits, drawn.permute(1, 0, 2, 3).flatten(1, 2), level.transpose(1, 2))
        assert logits is not None
        # Half precision keeps too few digits for a sum of exponentials.
        weights = logits.softmax(-1, dtype=torch.float32 if logits.dtype.itemsize < 4 else None).to(logits.dtype)
        if saliency is not None:
            weights = weights * saliency.unsqueeze(1).to(weights.dtype)
        values = None
        for level, weight in zip(levels, from_cells, strict=True):
            found = _product(weights, level, buffer).unflatten(1, (-1, queries))
            values = _sum(values, found.permute(1, 0, 2, 3).flatten(1, 2), weight.narrow(*part))
        assert values is not None
        read.append(values)
    joined = read[0] if len(read) == 1 else torch.cat(read)
    return joined.unflatten(1, (regions, queries)).transpose(0, 1)


def _sum(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """A batched product, added to what there is."""
    return torch.bmm(left, right) if total is None else torch.baddbmm(total, left, right)


def _product(left: Tensor, right: Tensor, buffer: Tensor | None) -> Tensor:
    """A batched product, into the buffer if there is one."""
    if buffer is None:
        return torch.bmm(left, right)
    shape = (left.shape[0], left.shape[1], right.shape[2])
    return torch.bmm(left, right, out=buffer.narrow(0, 0, math.prod(shape)).view(shape))


def _buffer(query: Tensor, width: int, plain: bool) -> tuple[Tensor | None, int]:
    """Memory for the products of a group of heads, and how many heads a group has.

    Fresh memory for each product would cost more than the product: the system hands it out page by page. Only without
    gradients, which need all of it kept, or derivatives of another kind, which no product into a buffer has; on a GPU
    the allocator keeps memory at hand, and launches count instead.
    """
    regions, heads, queries, _ = query.shape
    device = query.device.type
    if torch.is_grad_enabled() or device != "cpu" or torch.is_autocast_enabled(device) or not plain:
        return None, heads
    per_head = regions * queries * width
    group = min(heads, max(1, _BUFFER_BYTES // max(1, per_head * query.dtype.itemsize)))
    return query.new_empty(group * per_head), group
