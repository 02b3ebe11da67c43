"""The Triton kernels around a block's attention: levels joined, rows of the residual stream found, read, written back.

As in ``triton_kernels.py`` everything is computed in float32, and importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One compiled kernel serves all lengths of a sequence and numbers of tokens.
_any_length = triton.jit(do_not_specialize=["rows", "count", "steps", "cells", "length"])


@_any_length
def find_kernel(
    mask,  # (length,) bool
    out,  # (count,) int64
    length,
    count,
    TILE: tl.constexpr,
):
    """The first ``count`` places where the mask is true, then -1, by one program."""
    found = 0
    for start in range(0, length, TILE):
        place = start + tl.arange(0, TILE)
        here = tl.load(mask + place, mask=place < length, other=0).to(tl.int32)
        index = found + tl.cumsum(here, 0) - 1
        tl.store(out + index, place.to(tl.int64), mask=(here != 0) & (index < count))
        found += tl.sum(here, 0)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        tl.store(out + index, tl.full((TILE,), -1, tl.int64), mask=(index >= found) & (index < count))


@triton.jit
def _layer_norm(source, target, width, eps, PADDED: tl.constexpr):
    """Layer norm of one row."""
    channel = tl.arange(0, PADDED)
    inside = channel < width
    x = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    tl.store(target + channel, (centred * scale).to(target.dtype.element_ty), mask=inside)


@_any_length
def join_kernel(
    first,  # (images, cells, width) each, of the same strides
    second,
    third,
    fourth,
    out,  # (images, cells, levels*width), perhaps a part of wider rows
    image_stride,
    cell_stride,
    out_row,  # stride
    cells,
    width,
    eps,
    PADDED: tl.constexpr,
):
    """Up to four levels, each normalised, side by side: one cell of one level a program."""
    row, level = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = row // cells * image_stride + row % cells * cell_stride
    target = out + row * out_row + level * width
    if level == 0:
        _layer_norm(first + source, target, width, eps, PADDED)
    elif level == 1:
        _layer_norm(second + source, target, width, eps, PADDED)
    elif level == 2:
        _layer_norm(third + source, target, width, eps, PADDED)
    else:
        _layer_norm(fourth + source, target, width, eps, PADDED)


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
def _place_of(row, positions, count, steps):
    """Where each row (n,) stands in the ascending positions, and whether it does, by bisection.

    Negative positions at their end name no row.
    """
    low = tl.zeros_like(row)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        found = tl.load(positions + middle, mask=low < high, other=0)
        after = (found >= 0) & (found < row) & (low < high)
        low, high = tl.where(after, middle + 1, low), tl.where(after, high, middle)
    return low, tl.load(positions + low, mask=low < count, other=-1) == row


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
        other = (tile - products) * ROWS + tl.arange(0, ROWS)
        _, listed = _place_of(other, positions, count, steps)
        stays = ((other < rows) & (listed == 0))[:, None] & (column < width)[None, :]
        other = other.to(tl.int64)
        same = tl.load(hidden + other[:, None] * hidden_row + column[None, :], mask=stays, other=0.0)
        tl.store(out + other[:, None] * width + column[None, :], same, mask=stays)


@_any_length
def add_kernel(
    hidden,  # (rows, width)
    positions,  # (count,), ascending
    update,  # (count, width)
    out,  # (rows, width)
    hidden_row, update_row,  # strides
    rows, count, steps, width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The rows, an update added to those at the positions."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    before = tl.load(hidden + row[:, None] * hidden_row + column[None, :], mask=inside, other=0.0)
    place, listed = _place_of(row, positions, count, steps)
    change = tl.load(
        update + place[:, None] * update_row + column[None, :], mask=inside & listed[:, None], other=0.0
    ).to(out.dtype.element_ty)
    after = tl.where(listed[:, None], (before.to(tl.float32) + change.to(tl.float32)).to(out.dtype.element_ty), before)
    tl.store(out + row[:, None] * width + column[None, :], after, mask=inside)
