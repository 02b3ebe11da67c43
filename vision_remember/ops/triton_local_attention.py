"""Local attention by Triton kernels: one launch forward, the raster read where it lies, nothing of it copied.

The kernels are in ``triton_kernels.py``. Here they become two PyTorch operators, forward and backward, so that
``torch.compile`` and ``FakeTensorMode`` see one call each. Defining them needs torch only; triton is imported by the
first call that runs a kernel.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_remember.grid import Grid, region
from vision_remember.ops.regions import AxisRegions
from vision_remember.ops.transforms import has_tangent
from vision_remember.ops.triton_support import kernels_run, load_kernels
from vision_remember.ops.windowed import windowed_local_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256
"""Channels of a head that a kernel holds at once; a wider value is read in parts, a wider query is refused."""

# A larger block is a large matrix product, which the windowed back-end gives to tensor cores.
_LARGEST_WINDOW = 4
# Numbers of a tensor that one program holds at once, rows times channels: 8 per thread, one load of 16 bytes in half
# precision.
_TILE = 1024
# Said aloud because Triton's default for the second changes.
_COMPILE = {"num_warps": 4, "enable_fp_fusion": True}
_WINDOWED_CAN = "backend='windowed' can, inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
_SIZES = "SymInt h, SymInt w, SymInt H, SymInt W, SymInt levels, SymInt window"


def auto_local_attention(
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
    """The Triton kernels on a GPU that can run them, for small blocks; otherwise the windowed form."""
    suit = kernels_suit(query.device, query.dtype, query.shape[-1], window)
    suit = suit and not has_tangent((query, key, value, saliency, bias))
    attend = triton_local_attention if suit else windowed_local_attention
    return attend(
        query,
        key,
        value,
        query_grid=query_grid,
        key_grid=key_grid,
        key_levels=key_levels,
        window=window,
        saliency=saliency,
        bias=bias,
    )


def kernels_suit(device: torch.device, dtype: torch.dtype, width: int, window: int) -> bool:
    """Whether the kernels run there, for queries of so many channels a head, and suit blocks of such a side."""
    return dtype in DTYPES and width <= WIDEST and window <= _LARGEST_WINDOW and kernels_run(device)


def triton_local_attention(
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
    """See :func:`vision_remember.ops.local_attention`; the shapes are taken as already checked.

    Everything is computed in float32, whatever the dtype of the tensors. Gradients are summed in a fixed order, so two
    calls give the same bits. They cannot be differentiated again.

    Raises:
        ValueError: a dtype or width that the kernels do not have, or tensors that are not on a GPU.
        ImportError: triton is missing.
        RuntimeError: forward-mode derivatives are asked for.
    """
    if has_tangent((query, key, value, saliency, bias)):
        raise RuntimeError(f"backend='triton' cannot take forward-mode derivatives; {_WINDOWED_CAN}")
    if query.dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise ValueError(f"backend='triton' with {query.dtype}: expected {known}; backend='windowed' takes any")
    if query.shape[-1] > WIDEST:
        raise ValueError(
            f"backend='triton' with heads of {query.shape[-1]} channels: expected at most {WIDEST} in query and key;"
            " backend='windowed' takes any"
        )
    sizes = (*query_grid, *key_grid, key_levels, window)
    if value.shape[-1] <= WIDEST:
        return _forward(query, key, value, saliency, bias, *sizes)[0]
    parts = [_forward(query, key, part, saliency, bias, *sizes)[0] for part in value.split(WIDEST, dim=-1)]
    return torch.cat(parts, dim=-1)


class _Geometry(NamedTuple):
    """What the kernels need to know besides the two grids."""

    slots: int  # places of all blocks, also those without a query
    blocks_across: int
    frame_rows: int  # cells of the largest region
    frame_columns: int
    span_rows: int  # queries that see one cell, at most
    span_columns: int

    @property
    def owned(self) -> bool:
        """Whether each cell is seen by one query alone."""
        return self.span_rows == self.span_columns == 1


@functools.lru_cache(maxsize=256)
def _geometry(h: int, w: int, H: int, W: int, window: int) -> _Geometry:
    rows, columns = AxisRegions(h, H, window), AxisRegions(w, W, window)
    slots = rows.blocks * columns.blocks * window**2
    spans = _longest_span(h, H, window), _longest_span(w, W, window)
    return _Geometry(slots, columns.blocks, rows.extent, columns.extent, *spans)


def _longest_span(tokens: int, cells: int, window: int) -> int:
    """The most queries of one axis that see the same cell: the rule of regions with its sides swapped, whole blocks."""
    bounds = [region(cell, cell + 1, cells, tokens) for cell in range(cells)]
    return max(min(-(-stop // window) * window, tokens) - start // window * window for start, stop in bounds)


@torch.library.custom_op(
    "vision_remember::local_attention",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, Tensor? saliency, Tensor? bias, {_SIZES}) -> (Tensor, Tensor)",
)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saliency: Tensor | None,
    bias: Tensor | None,
    h: int,
    w: int,
    H: int,
    W: int,
    levels: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The output (B, heads, h*w, d_v) and the logarithm of each softmax's denominator (B, heads, slots)."""
    kernels = load_kernels(query.device)
    geometry = _geometry(h, w, H, W, window)
    query, key, value = (_dense_rows(x) for x in (query, key, value))
    out, lse = _empty_outputs(query, value, h, w, window)
    options = _options(query, value, saliency, bias)
    queries = _rows(geometry.slots, options)
    with torch.cuda.device_of(query):  # a model may be spread over several GPUs
        kernels.forward_kernel[(_programs(query, geometry.slots, queries),)](
            *(query, key, value, _dense(saliency), _dense(bias), out, lse, 1 / math.sqrt(query.shape[-1])),
            *(stride for x in (query, key, value, out) for stride in x.stride()[:3]),
            *(query.shape[1], h, w, H, W, window, levels, *geometry[:4], _bias_slots(bias, geometry, window)),
            **options,
            SHARED_BIAS=_is_shared(bias),
            QUERIES=queries,
            **_COMPILE,
        )
    return out, lse


@_forward.register_fake
def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saliency: Tensor | None,
    bias: Tensor | None,
    h: int,
    w: int,
    H: int,
    W: int,
    levels: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query, value, h, w, window)


@torch.library.custom_op(
    "vision_remember::local_attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? saliency, Tensor? bias, Tensor out,"
        f" Tensor lse, bool wants_saliency, bool wants_bias, {_SIZES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saliency: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wants_saliency: bool,
    wants_bias: bool,
    h: int,
    w: int,
    H: int,
    W: int,
    levels: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value, saliency and bias; the last two are empty where nobody wants them."""
    kernels = load_kernels(query.device)
    geometry = _geometry(h, w, H, W, window)
    # What was saved may have gone through hooks that lay it out anew.
    query, key, value, out, grad_out = (_dense_rows(x) for x in (query, key, value, out, grad_out))
    lse = lse.contiguous()
    grad_query, grad_key, grad_value = (_empty_heads(*x.shape, like=x) for x in (query, key, value))
    places = levels * geometry.frame_rows * geometry.frame_columns
    batch, heads = query.shape[:2]
    blocks = geometry.slots // window**2
    logit_parts = lse.new_empty((batch, heads, places, blocks, window**2) if wants_bias else (0,))
    saliency_parts = lse.new_empty((batch, heads, key.shape[2]) if wants_saliency else (0,))
    scale = 1 / math.sqrt(query.shape[-1])
    options = _options(query, value, saliency, bias) | {"WANTS_SALIENCY": wants_saliency}
    at_once = geometry.owned and options["UNROLLED"] > 1
    delta = lse.new_empty((0,) if at_once else lse.shape)

    inputs = (query, key, value, _dense(saliency), _dense(bias))
    numbers = (heads, h, w, H, W, window, levels, *geometry[:4], _bias_slots(bias, geometry, window))
    queries, cells = _rows(geometry.slots, options), _rows(key.shape[2], options)
    with torch.cuda.device_of(query):
        of_cells = (grad_key, grad_value, saliency_parts)
        rasters = (query, key, value, out, grad_out, grad_query, grad_key, grad_value)
        kernels.query_gradient_kernel[(_programs(query, geometry.slots, queries),)](
            *(*inputs, out, grad_out, lse, delta, grad_query, *of_cells, logit_parts, scale),
            *(stride for x in rasters for stride in x.stride()[:3]),
            *numbers,
            **_with_cells(options, at_once),
            WANTS_BIAS=wants_bias,
            QUERIES=queries,
            **_COMPILE,
        )
        if not at_once:
            kernels.cell_gradient_kernel[(_programs(query, key.shape[2], cells),)](
                *(*inputs, grad_out, lse, delta, *of_cells, scale),
                *(stride for x in (query, key, value, grad_out, grad_key, grad_value) for stride in x.stride()[:3]),
                *(*numbers, *geometry[4:]),
                **options,
                CELLS=cells,
                **_COMPILE,
            )
    grad_saliency = saliency_parts.sum(1).to(query.dtype) if wants_saliency else query.new_empty(0)
    grad_bias = query.new_empty(0)
    if bias is not None and wants_bias:
        grad_bias = logit_parts.sum((0, 3) if bias.ndim == 3 else 0).movedim(1, -1).to(query.dtype).contiguous()
    return grad_query, grad_key, grad_value, grad_saliency, grad_bias


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saliency: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wants_saliency: bool,
    wants_bias: bool,
    *sizes: int,
) -> tuple[Tensor, ...]:
    grads = [_empty_heads(*x.shape, like=x) for x in (query, key, value)]
    for x, wanted in ((saliency, wants_saliency), (bias, wants_bias)):
        grads.append(query.new_empty(x.shape if x is not None and wanted else 0))
    return tuple(grads)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.sizes = inputs[5:]
    ctx.set_materialize_grads(False)  # nobody reads the denominators: no zeros for their gradient


def _gradients(ctx: Any, grad_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad[3:5]
    grads: tuple[Tensor | None, ...] = _backward(grad_out, *ctx.saved_tensors, *wants, *ctx.sizes)
    wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return (*wanted, *(None for _ in ctx.sizes))


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(f"the gradients of backend='triton' cannot be differentiated again; those of {_WINDOWED_CAN}")


_forward.register_autograd(_gradients, setup_context=_keep)
_backward.register_autograd(_no_second_derivative)


def _empty_heads(batch: int, heads: int, length: int, dim: int, *, like: Tensor) -> Tensor:
    """(batch, heads, length, dim), laid out so that joining the heads copies nothing."""
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _empty_outputs(query: Tensor, value: Tensor, h: int, w: int, window: int) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    slots = -(-h // window) * -(-w // window) * window * window
    lse = query.new_empty(batch, heads, slots, dtype=torch.float32)
    return _empty_heads(batch, heads, length, value.shape[-1], like=query), lse


def _dense_rows(x: Tensor) -> Tensor:
    """The tensor itself wherever the channels of a row lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _bias_slots(bias: Tensor | None, geometry: _Geometry, window: int) -> int:
    """Rows of the bias per head: one for each slot, or one for each slot of a block that all blocks share."""
    return window**2 if bias is None or bias.ndim == 3 else geometry.slots


def _is_shared(bias: Tensor | None) -> bool:
    """Whether all queries of a head have the same bias."""
    return bias is not None and bias.shape[1:-1].numel() == 1


def _options(query: Tensor, value: Tensor, saliency: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
    """What the kernels are compiled for."""
    D, DV = query.shape[-1], value.shape[-1]
    return {
        "HAS_SALIENCY": saliency is not None,
        "HAS_BIAS": bias is not None,
        "D": D,
        "D_PADDED": _power_of_two(D),
        "DV": DV,
        "DV_PADDED": _power_of_two(DV),
        # Rows that are no power of two wide are read number by number; four at once would not fit the registers.
        "UNROLLED": 4 if _power_of_two(D) == D and _power_of_two(DV) == DV else 1,
    }


def _with_cells(options: dict[str, Any], at_once: bool) -> dict[str, Any]:
    """What the kernel of the queries' gradients is compiled for, with those of their cells or without."""
    # Those are two rows more for each cell: with several cells at once registers spill, and an H200 is slower.
    return {**options, "OWNS_CELLS": at_once, "UNROLLED": 1 if at_once else options["UNROLLED"]}


def _rows(count: int, options: dict[str, Any]) -> int:
    """How many queries, or cells, one program takes."""
    return min(max(_TILE // max(options["D_PADDED"], options["DV_PADDED"]), 1), _power_of_two(count))


def _programs(query: Tensor, count: int, together: int) -> int:
    return query.shape[0] * query.shape[1] * -(-count // together)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
