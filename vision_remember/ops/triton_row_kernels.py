"""The Triton kernels around a block's attention: from the rows of the residual stream, and back into them.

As in ``triton_kernels.py`` everything is computed in float32, and importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One compiled kernel serves all lengths of a sequence and numbers of tokens.
_any_length = triton.jit(do_not_specialize=["rows", "count", "steps"])


@triton.jit
def normalise_kernel(
    hidden,  # (rows, width)
    positions,  # (count,)
    weight,  # (width,)
    out,  # (count, width)
    hidden_row,  # stride
    width,
    eps,
    PADDED: tl.constexpr,
):
    """RMS norm of the row of ``hidden`` that a position names, one row a program."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(positions + row)
    channel = tl.arange(0, PADDED)
    inside = channel < width
    x = tl.load(hidden + tl.maximum(place, 0) * hidden_row + channel, mask=inside, other=0.0)
    x = tl.where(place >= 0, x, 0.0).to(out.dtype.element_ty).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + channel, (x * scale * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _is_listed(row, positions, count, steps):
    """Whether each row (n,) is among the ascending positions, by bisection; negative ones at the end name no row."""
    low = tl.zeros_like(row)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        found = tl.load(positions + middle, mask=low < high, other=0)
        after = (found >= 0) & (found < row) & (low < high)
        low, high = tl.where(after, middle + 1, low), tl.where(after, high, middle)
    return tl.load(positions + low, mask=low < count, other=-1) == row


@_any_length
def write_kernel(
    hidden,  # (rows, width)
    positions,  # (count,), ascending
    read,  # (count, inner)
    weight,  # (width, inner)
    bias,  # (width,)
    out,  # (rows, width)
    hidden_row, read_row,  # strides
    rows, count, steps, width, inner,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """A linear layer of ``read`` added to the rows at the positions; all other rows are copied.

    The first programs multiply, ROWS positions each; those behind them copy, ROWS rows each.
    """
    products = tl.cdiv(count, ROWS)
    tile = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if tile < products:
        index = tile * ROWS + tl.arange(0, ROWS)
        row = tl.load(positions + index, mask=index < count, other=-1).to(tl.int64)
        update = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, inner, INNER):
            k = start + tl.arange(0, INNER)
            left = tl.load(
                read + index.to(tl.int64)[:, None] * read_row + k[None, :],
                mask=(index < count)[:, None] & (k < inner)[None, :],
                other=0.0,
            )
            right = tl.load(
                weight + column.to(tl.int64)[None, :] * inner + k[:, None],
                mask=(column < width)[None, :] & (k < inner)[:, None],
                other=0.0,
            )
            update = tl.dot(left, right, update, input_precision="ieee")
        if HAS_BIAS:
            update += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        # As two operators would: rounded to the layer's dtype, then to the stream's.
        update = update.to(read.dtype.element_ty).to(out.dtype.element_ty).to(tl.float32)
        inside = (row >= 0)[:, None] & (column < width)[None, :]
        before = tl.load(hidden + row[:, None] * hidden_row + column[None, :], mask=inside, other=0.0)
        after = (before.to(tl.float32) + update).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * width + column[None, :], after, mask=inside)
    else:
        row = ((tile - products) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        stays = (row < rows) & (_is_listed(row, positions, count, steps) == 0)
        inside = stays[:, None] & (column < width)[None, :]
        same = tl.load(hidden + row[:, None] * hidden_row + column[None, :], mask=inside, other=0.0)
        tl.store(out + row[:, None] * width + column[None, :], same, mask=inside)
