"""Regions on a CPU: the fused attention without gradients; sums of products for one query, a bias and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F

from vision_remember.ops.transforms import has_tangent, is_transformed

# What the products of the regions at hand may take: measured fastest between 256 kB and 1 MB, of caches of 2 MB.
_BYTES_AT_A_TIME = 1 << 19
# A vector of AVX-512. Four regions of four cells were measured at two thirds of the time that each takes alone.
_CELLS_TOGETHER = 16


def attend_one_query(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Dense attention of the one query of each of many small regions.

    A batched product would start once per region and head, for a handful of numbers. Products of all regions at once
    would be one tensor as large as the keys and one as large as the values, and two more in the backward pass. Those
    of a few regions never leave the cache, and gradients are written where they stay.

    Args:
        query: (R, heads, 1, d), scaled already.
        key: (R, heads, n, d).
        value: (R, heads, n, d_v).
        bias: added to the logits, (heads, 1, n) or (R, heads, 1, n).

    Returns:
        (R, heads, 1, d_v); heads stand last but one in memory.
    """
    # Heads last but one, (R, n, heads, d), as projections make them: sums run over rows that lie together.
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    bias = bias.movedim(-1, -3).expand(key.shape[0], -1, -1, -1)
    if not is_plain(query, key, value, bias):
        return _read(value, _weights(query, key, bias)).unsqueeze(2)
    return _OneQuery.apply(query, key, value, bias).unsqueeze(2)


def attend_without_gradients(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, per_image: int
) -> Tensor:
    """Dense attention inside regions by a CPU's fused kernel, with the bias for a mask.

    Where a region has one query over a few cells, the cells of as many regions as fill a vector are laid before their
    queries together, and the mask hides those of the other regions.

    Args:
        query: (R, heads, q, d), not yet scaled.
        key: (R, heads, n, d).
        value: (R, heads, n, d_v).
        bias: (heads, q, n) or (R, heads, q, n), or None.
        per_image: regions of one image, which alone are laid together.
    """
    if bias is not None:
        bias = bias.detach()  # the kernel is left for a slow way where a mask might want a gradient
        bias = bias.unsqueeze(0) if bias.ndim == 3 else bias
    regions, heads, queries, _ = query.shape
    cells = key.shape[2]
    together = _CELLS_TOGETHER // cells if _CELLS_TOGETHER % cells == 0 else 1
    one_bias = bias is None or len(bias) == 1
    if together == 1 or queries > 1 or per_image % together or not one_bias:
        return F.scaled_dot_product_attention(query, key, value, bias)
    # (heads, queries, regions of the cells, n)
    mask = query.new_full((heads, together, together, cells), -math.inf)
    mask.diagonal(dim1=1, dim2=2).copy_(query.new_zeros(()) if bias is None else bias[0].transpose(1, 2))
    query, key, value = (
        x.transpose(1, 2).unflatten(0, (regions // together, together)).flatten(1, 2).transpose(1, 2)
        for x in (query, key, value)
    )
    read = F.scaled_dot_product_attention(query, key, value, mask.flatten(2).unsqueeze(0))
    return read.transpose(1, 2).flatten(0, 1).unsqueeze(2)


def is_plain(*tensors: Tensor) -> bool:
    """Whether tensors of one dtype are to give numbers, and gradients at most.

    That is, no graph of operators, no transform and no forward derivative.
    """
    if torch.compiler.is_compiling() or get_proxy_mode() is not None or is_transformed():
        return False
    if len({x.dtype for x in tensors}) > 1:
        return False
    # Gradients for many cotangents at once come as batches of an older kind, and of no transform.
    batched = torch._C._functorch.is_legacy_batchedtensor
    return not (has_tangent(tensors) or any(batched(x) for x in tensors))


def softmax(logits: Tensor, dim: int) -> Tensor:
    """Softmax in the logits' dtype. Half precision keeps too few digits for a sum of exponentials."""
    return _wide_softmax(logits, dim).to(logits.dtype)


class _OneQuery(torch.autograd.Function):
    """(R, 1, heads, d), (R, n, heads, d), (R, n, heads, d_v) and (R, n, heads, 1) -> (R, heads, d_v)."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        weights = bias.new_empty(bias.shape, dtype=_wide(bias.dtype))
        read = value.new_empty(len(value), *value.shape[2:])
        for part, with_keys, with_values in _parts(key, value):
            weights[part] = _weights(query[part], key[part], bias[part], room=with_keys)
            _read(value[part], weights[part], room=with_values, out=read[part])
        ctx.save_for_backward(query, key, value, bias, weights)
        return read

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, weights = ctx.saved_tensors
        cotangent = cotangent.unsqueeze(1)
        if is_plain(cotangent) and not torch.is_grad_enabled():
            return _gradients_in_parts(query, key, value, weights, cotangent, ctx.needs_input_grad)
        # The gradients may be differentiated in their turn: from the arguments on, in operators that can be.
        return _gradients(query, key, value, _weights(query, key, bias), cotangent, ctx.needs_input_grad)


def _weights(query: Tensor, key: Tensor, bias: Tensor, *, room: Tensor | None = None) -> Tensor:
    """(R, n, heads, 1); half precision gets float32. ``room`` holds the products."""
    return _wide_softmax(torch.mul(query, key, out=room).sum(-1, keepdim=True) + bias, 1)


def _read(value: Tensor, weights: Tensor, *, room: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """(R, heads, d_v)."""
    return torch.sum(torch.mul(weights.to(value.dtype), value, out=room), 1, out=out)


def _gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    cotangent: Tensor,
    needed: tuple[bool, ...],
    *,
    rooms: tuple[Tensor | None, ...] = (None, None),
    out: tuple[Tensor | None, ...] = (None, None, None),
) -> tuple[Tensor | None, ...]:
    """Those of query, key, value and bias where ``needed``, for a (R, 1, heads, d_v) cotangent.

    ``rooms`` hold the products with keys and with values, ``out`` the first three gradients.
    """
    by_weight = torch.mul(cotangent, value, out=rooms[1]).sum(-1, keepdim=True) * weights
    by_logit = (by_weight - weights * by_weight.sum(1, keepdim=True)).to(key.dtype)
    return (
        torch.sum(torch.mul(by_logit, key, out=rooms[0]), 1, keepdim=True, out=out[0]) if needed[0] else None,
        torch.mul(by_logit, query, out=out[1]) if needed[1] else None,
        torch.mul(weights.to(value.dtype), cotangent, out=out[2]) if needed[2] else None,
        by_logit if needed[3] else None,
    )


def _gradients_in_parts(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, cotangent: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """:func:`_gradients`, each written into its place."""
    made = [torch.empty_like(x) if need else None for x, need in zip((query, key, value), needed, strict=False)]
    by_bias = key.new_empty(weights.shape) if needed[3] else None
    for part, with_keys, with_values in _parts(key, value):
        by_logit = _gradients(
            query[part],
            key[part],
            value[part],
            weights[part],
            cotangent[part],
            needed,
            rooms=(with_keys, with_values),
            out=tuple(x if x is None else x[part] for x in made),
        )[3]
        if by_bias is not None and by_logit is not None:
            by_bias[part] = by_logit
    return *made, by_bias


def _parts(key: Tensor, value: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few regions at a time, with room for their products with keys and, at another time, with values."""
    wider = key if key.shape[-1] > value.shape[-1] else value
    region = math.prod(wider.shape[1:]) * wider.itemsize
    at_a_time = max(1, _BYTES_AT_A_TIME // max(1, region))
    room = wider.new_empty(min(at_a_time, len(wider)), *wider.shape[1:])
    for start in range(0, len(wider), at_a_time):
        part = slice(start, min(start + at_a_time, len(wider)))
        here = room[: part.stop - start]
        yield part, here[..., : key.shape[-1]], here[..., : value.shape[-1]]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _wide_softmax(logits: Tensor, dim: int) -> Tensor:
    return logits.softmax(dim, dtype=_wide(logits.dtype))
