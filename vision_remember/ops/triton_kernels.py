"""The Triton kernels of local attention. Importing this module imports triton; its caller does so when first needed.

Each program holds some queries, a row of channels each, and goes through the cells of their regions, one cell of every
region at a time; for the gradients of keys and values, where several queries see a cell, it holds cells and goes
through these queries. A region holds few cells, four with the usual ratio, so the products are sums over channels in
float32, not matrix products: a tensor core's smallest tile would be mostly padding, and the time goes into reading keys
and values, which are read where they lie in the raster.

Queries are counted by *slots*: block after block, the k*k places of each. A smaller last block leaves some slots empty.
The cells of a region are counted in a frame as large as the largest region, level after level, which is the order of a
bias per block; where a region is smaller, some places of the frame are empty.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels, on any device: TRITON_INTERPRET=1 was set."""

# One compiled kernel serves all grids: images come in many sizes.
_COUNTS = ["heads", "h", "w", "H", "W", "window", "levels", "slots", "blocks_across", "frame_rows", "frame_columns"]
_any_grid = triton.jit(do_not_specialize=[*_COUNTS, "bias_slots"])
_any_grid_and_span = triton.jit(do_not_specialize=[*_COUNTS, "bias_slots", "span_rows", "span_columns"])


@triton.jit
def _region(block, window, tokens, cells):
    """First cell of a block's region along one axis, and how many there are."""
    first = block * window * cells // tokens
    return first, tl.cdiv(tl.minimum((block + 1) * window, tokens) * cells, tokens) - first


@triton.jit
def _queries_of(cell, window, tokens, cells):
    """The reverse: first query that sees a cell along one axis, and how many do, whole blocks of them."""
    first = cell * tokens // cells // window * window
    after = tl.cdiv(tl.cdiv((cell + 1) * tokens, cells), window) * window
    return first, tl.minimum(after, tokens) - first


@triton.jit
def _read(base, index, stride, valid, width: tl.constexpr, padded: tl.constexpr):
    """Rows of a raster in float32, zero where not valid: (n,) numbers -> (n, padded)."""
    channels = tl.arange(0, padded)
    places = (index.to(tl.int64) * stride)[:, None] + channels[None, :]
    return tl.load(base + places, mask=valid[:, None] & (channels < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _write(base, index, stride, valid, rows, width: tl.constexpr, padded: tl.constexpr):
    """The reverse of :func:`_read` for (n, padded) rows."""
    channels = tl.arange(0, padded)
    places = (index.to(tl.int64) * stride)[:, None] + channels[None, :]
    tl.store(base + places, rows.to(base.dtype.element_ty), mask=valid[:, None] & (channels < width)[None, :])


@triton.jit
def _slot(slot, slots, h, w, window, blocks_across):
    """Query number, block row and block column of each slot, and whether a query is there."""
    inside = tl.minimum(slot, slots - 1)
    block, place = inside // (window * window), inside % (window * window)
    block_row, block_column = block // blocks_across, block % blocks_across
    row, column = block_row * window + place // window, block_column * window + place % window
    return row * w + column, block_row, block_column, (slot < slots) & (row < h) & (column < w)


@triton.jit
def _framed_cell(place, top, height, left, breadth, H, W, frame_rows, frame_columns):
    """Of the regions (n,), the number of the cell at one place of the frame, and whether a cell is there."""
    level, row = place // (frame_rows * frame_columns), place // frame_columns % frame_rows
    column = place % frame_columns
    return (level * H + top + row) * W + left + column, (row < height) & (column < breadth)


@triton.jit
def _bias_of(bias, head, slot, place, bias_slots, places, there, SHARED: tl.constexpr):
    """What is added to the logits of queries (n,), each at a place (n,) of its frame: (n,).

    One number for all, where all queries of a head share the bias and are at the same place. In the backward kernels
    that made no difference, or spilled registers.
    """
    if SHARED:
        added = tl.load(bias + head * places + place)
    else:
        index = (head * bias_slots + slot % bias_slots) * places + place
        added = tl.load(bias + index, mask=there, other=0.0)
    return added.to(tl.float32)


@_any_grid
def forward_kernel(
    query,
    key,
    value,
    saliency,  # (B, L*H*W)
    bias,  # (heads, bias_slots, places): one for each slot, or one for each slot of a block
    out,
    lse,  # (B*heads, slots) float32, what the backward kernels need to rebuild the weights
    scale,
    query_batch, query_head, query_row,  # strides
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    out_batch, out_head, out_row,
    heads, h, w, H, W, window, levels,
    slots, blocks_across, frame_rows, frame_columns, bias_slots,
    HAS_SALIENCY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHARED_BIAS: tl.constexpr,  # one for all queries of a head
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    UNROLLED: tl.constexpr,  # cells, or queries, whose rows are asked for at once
    QUERIES: tl.constexpr,
):  # fmt: skip
    """Some queries of one head of one image, all their cells one by one, softmax on the way."""
    tiles = tl.cdiv(slots, QUERIES)
    image_head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    image, head = image_head // heads, image_head % heads
    query += image * query_batch + head * query_head
    key += image * key_batch + head * key_head
    value += image * value_batch + head * value_head
    out += image * out_batch + head * out_head

    slot = tile * QUERIES + tl.arange(0, QUERIES)
    index, block_row, block_column, exists = _slot(slot, slots, h, w, window, blocks_across)
    top, height = _region(block_row, window, h, H)
    left, breadth = _region(block_column, window, w, W)
    q = _read(query, index, query_row, exists, D, D_PADDED) * scale
    places = levels * frame_rows * frame_columns
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    read = tl.zeros((QUERIES, DV_PADDED), tl.float32)
    for place in tl.range(0, places, loop_unroll_factor=UNROLLED):
        cell, there = _framed_cell(place, top, height, left, breadth, H, W, frame_rows, frame_columns)
        there = there & exists
        k = _read(key, cell, key_row, there, D, D_PADDED)
        v = _read(value, cell, value_row, there, DV, DV_PADDED)
        logits = tl.sum(q * k, 1)
        if HAS_BIAS:
            logits += _bias_of(bias, head, slot, place, bias_slots, places, there, SHARED_BIAS)
        logits = tl.where(there, logits, float("-inf"))
        higher = tl.maximum(highest, logits)
        # while all cells so far are masked, by a bias of minus infinity, there is nothing to take off
        offset = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(highest - offset)
        weights = tl.exp(logits - offset)
        total = total * shrink + weights
        if HAS_SALIENCY:
            weights *= tl.load(saliency + image * levels * H * W + cell, mask=there, other=0.0).to(tl.float32)
        read = read * shrink[:, None] + weights[:, None] * v
        highest = higher
    total = tl.where(exists, total, 1.0)
    _write(out, index, out_row, exists, read / total[:, None], DV, DV_PADDED)
    tl.store(lse + image_head * slots + slot, tl.where(exists, highest + tl.log(total), 0.0), mask=slot < slots)


@_any_grid
def query_gradient_kernel(
    query,
    key,
    value,
    saliency,
    bias,
    out,
    grad_out,
    lse,
    delta,  # (B*heads, slots) float32: grad_out . out of each query, for the next kernel
    grad_query,
    grad_key,
    grad_value,
    grad_saliency,  # (B*heads, L*H*W) float32, the parts of the saliency gradient
    grad_logits,  # (B*heads, places, slots) float32, the parts of the bias gradient: what is summed up lies together
    scale,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    out_batch, out_head, out_row,
    grad_out_batch, grad_out_head, grad_out_row,
    grad_query_batch, grad_query_head, grad_query_row,
    grad_key_batch, grad_key_head, grad_key_row,
    grad_value_batch, grad_value_head, grad_value_row,
    heads, h, w, H, W, window, levels,
    slots, blocks_across, frame_rows, frame_columns, bias_slots,
    HAS_SALIENCY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANTS_SALIENCY: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
    OWNS_CELLS: tl.constexpr,  # every cell is seen by one query, which then writes the cell's gradients too
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    UNROLLED: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """The gradients of some queries and of the logits of their cells; and those of the cells, if no other sees them."""
    tiles = tl.cdiv(slots, QUERIES)
    image_head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    image, head = image_head // heads, image_head % heads
    query += image * query_batch + head * query_head
    key += image * key_batch + head * key_head
    value += image * value_batch + head * value_head
    out += image * out_batch + head * out_head
    grad_out += image * grad_out_batch + head * grad_out_head
    grad_query += image * grad_query_batch + head * grad_query_head
    grad_key += image * grad_key_batch + head * grad_key_head
    grad_value += image * grad_value_batch + head * grad_value_head

    slot = tile * QUERIES + tl.arange(0, QUERIES)
    index, block_row, block_column, exists = _slot(slot, slots, h, w, window, blocks_across)
    q = _read(query, index, query_row, exists, D, D_PADDED) * scale
    go = _read(grad_out, index, grad_out_row, exists, DV, DV_PADDED)
    dot = tl.sum(go * _read(out, index, out_row, exists, DV, DV_PADDED), 1)
    norm = tl.load(lse + image_head * slots + slot, mask=exists, other=0.0)
    if not OWNS_CELLS:
        tl.store(delta + image_head * slots + slot, dot, mask=exists)
    top, height = _region(block_row, window, h, H)
    left, breadth = _region(block_column, window, w, W)
    cells, places = levels * H * W, levels * frame_rows * frame_columns
    gq = tl.zeros((QUERIES, D_PADDED), tl.float32)
    for place in tl.range(0, places, loop_unroll_factor=UNROLLED):
        cell, there = _framed_cell(place, top, height, left, breadth, H, W, frame_rows, frame_columns)
        there = there & exists
        k = _read(key, cell, key_row, there, D, D_PADDED)
        v = _read(value, cell, value_row, there, DV, DV_PADDED)
        logits = tl.sum(q * k, 1)
        if HAS_BIAS:
            logits += _bias_of(bias, head, slot, place, bias_slots, places, there, False)
        weights = tl.exp(tl.where(there, logits - norm, float("-inf")))
        grad_weights = tl.sum(go * v, 1)
        if OWNS_CELLS and WANTS_SALIENCY:
            tl.store(grad_saliency + image_head * cells + cell, weights * grad_weights, mask=there)
        if HAS_SALIENCY:
            salient = tl.load(saliency + image * cells + cell, mask=there, other=0.0).to(tl.float32)
            grad_weights *= salient
        gl = weights * (grad_weights - dot)
        gq += gl[:, None] * k
        if OWNS_CELLS:
            _write(grad_key, cell, grad_key_row, there, gl[:, None] * q, D, D_PADDED)  # q holds the scale
            gv = weights[:, None] * go
            if HAS_SALIENCY:
                gv *= salient[:, None]
            _write(grad_value, cell, grad_value_row, there, gv, DV, DV_PADDED)
        if WANTS_BIAS:
            # empty slots and places too, as zeros: all of it is summed up
            tl.store(grad_logits + (image_head * places + place) * slots + slot, gl, mask=slot < slots)
    _write(grad_query, index, grad_query_row, exists, gq * scale, D, D_PADDED)


@_any_grid_and_span
def cell_gradient_kernel(
    query,
    key,
    value,
    saliency,
    bias,
    grad_out,
    lse,
    delta,
    grad_key,
    grad_value,
    grad_saliency,  # (B*heads, L*H*W) float32, the parts of the saliency gradient
    scale,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    grad_out_batch, grad_out_head, grad_out_row,
    grad_key_batch, grad_key_head, grad_key_row,
    grad_value_batch, grad_value_head, grad_value_row,
    heads, h, w, H, W, window, levels,
    slots, blocks_across, frame_rows, frame_columns, bias_slots, span_rows, span_columns,
    HAS_SALIENCY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANTS_SALIENCY: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    UNROLLED: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """The gradients of some cells: each adds up its queries, always in the same order, where regions overlap too."""
    cells = levels * H * W
    tiles = tl.cdiv(cells, CELLS)
    image_head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    image, head = image_head // heads, image_head % heads
    query += image * query_batch + head * query_head
    key += image * key_batch + head * key_head
    value += image * value_batch + head * value_head
    grad_out += image * grad_out_batch + head * grad_out_head
    grad_key += image * grad_key_batch + head * grad_key_head
    grad_value += image * grad_value_batch + head * grad_value_head

    cell = tile * CELLS + tl.arange(0, CELLS)
    exists = cell < cells
    level, y, x = cell // (H * W), cell // W % H, cell % W
    top, height = _queries_of(y, window, h, H)
    left, breadth = _queries_of(x, window, w, W)
    k = _read(key, cell, key_row, exists, D, D_PADDED)
    v = _read(value, cell, value_row, exists, DV, DV_PADDED)
    if HAS_SALIENCY:
        salient = tl.load(saliency + image * cells + cell, mask=exists, other=0.0).to(tl.float32)
    places = levels * frame_rows * frame_columns
    gk = tl.zeros((CELLS, D_PADDED), tl.float32)
    gv = tl.zeros((CELLS, DV_PADDED), tl.float32)
    gs = tl.zeros((CELLS,), tl.float32)
    for step in tl.range(0, span_rows * span_columns, loop_unroll_factor=UNROLLED):
        down, across = step // span_columns, step % span_columns
        there = exists & (down < height) & (across < breadth)
        row, column = top + down, left + across
        index = row * w + column
        block_row, block_column = row // window, column // window
        slot = (block_row * blocks_across + block_column) * window * window + row % window * window + column % window
        q = _read(query, index, query_row, there, D, D_PADDED)
        go = _read(grad_out, index, grad_out_row, there, DV, DV_PADDED)
        norm = tl.load(lse + image_head * slots + slot, mask=there, other=0.0)
        dot = tl.load(delta + image_head * slots + slot, mask=there, other=0.0)
        logits = tl.sum(q * k, 1) * scale
        if HAS_BIAS:
            inner_row = y - block_row * window * H // h
            inner_column = x - block_column * window * W // w
            place = (level * frame_rows + inner_row) * frame_columns + inner_column
            logits += _bias_of(bias, head, slot, place, bias_slots, places, there, False)
        weights = tl.exp(tl.where(there, logits - norm, float("-inf")))
        grad_weights = tl.sum(go * v, 1)
        gv += weights[:, None] * go
        if WANTS_SALIENCY:
            gs += weights * grad_weights
        if HAS_SALIENCY:
            grad_weights *= salient
        gk += (weights * (grad_weights - dot))[:, None] * q
    if HAS_SALIENCY:
        gv *= salient[:, None]
    if WANTS_SALIENCY:
        tl.store(grad_saliency + image_head * cells + cell, gs, mask=exists)
    _write(grad_key, cell, grad_key_row, exists, gk * scale, D, D_PADDED)
    _write(grad_value, cell, grad_value_row, exists, gv, DV, DV_PADDED)
