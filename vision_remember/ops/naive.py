"""Local attention by its definition: one loop per query, no cleverness. The oracle of every other back-end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vision_remember.grid import Grid


def naive_local_attention(
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
    """See :func:`vision_remember.ops.local_attention`; the arguments are taken as already checked."""
    (h, w), (rows, columns) = query_grid, key_grid
    # rows and columns of the largest region: a bias per block is laid out in them
    frame_rows = max(math.ceil(min(y + window, h) * rows / h) - y * rows // h for y in range(0, h, window))
    frame = max(math.ceil(min(x + window, w) * columns / w) - x * columns // w for x in range(0, w, window))
    levels = range(key_levels)
    outputs = []
    for i in range(h):
        for j in range(w):
            top, left = i - i % window, j - j % window
            bottom, right = min(top + window, h), min(left + window, w)
            ys = range(top * rows // h, math.ceil(bottom * rows / h))
            xs = range(left * columns // w, math.ceil(right * columns / w))
            cells = [(level * rows + y) * columns + x for level in levels for y in ys for x in xs]
            logits = (query[:, :, i * w + j, None] * key[:, :, cells]).sum(-1) / math.sqrt(query.shape[-1])
            slot = (i - top) * window + (j - left)
            if bias is not None and bias.ndim == 3:
                logits = logits + bias[:, slot]
            elif bias is not None:
                block = (i // window) * math.ceil(w / window) + j // window
                inside = [(y - ys.start) * frame + (x - xs.start) for y in ys for x in xs]
                places = [level * frame_rows * frame + place for level in levels for place in inside]
                logits = logits + bias[:, block, slot, places]
            weights = logits.softmax(-1)
            if saliency is not None:
                weights = weights * saliency[:, None, cells]
            outputs.append((weights[..., None] * value[:, :, cells]).sum(-2))
    return torch.stack(outputs, dim=2)
