"""What a vision encoder's attention tells of its patches, computed from a block's input before it runs.

One query row where there is a CLS token, and the mean of all rows, some at a time, where there is none: no attention
map is built and the encoder stays on fused attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.encoder import EncoderSpec, find, find_module, project
from vision_remember.grid import Grid

_ROWS = 256
"""Queries at a time."""


@torch.no_grad()
def patch_attention(block: nn.Module, spec: EncoderSpec, hidden: Tensor, *, heads: bool) -> tuple[Tensor, Tensor]:
    """(T, N) attention that each patch gets, in float32, and (T, N, heads, d) keys.

    Args:
        block: of an encoder whose patches stand in raster order behind the prefix tokens.
        spec: of the encoder.
        hidden: (T, prefix + N, C), its input.
        heads: a softmax for each head, averaged; otherwise one over the full width, as if there were one head.
    """
    normed = find_module(block, spec.norm or "", "attention norm")(hidden)
    sources = normed if spec.cls_token is None else normed[:, spec.cls_token, None]
    count = int(find(block, spec.num_heads or ""))  # type: ignore[call-overload]
    query = _normed(block, spec.query, "q_norm", project(spec, block, "query", sources))
    keys = _normed(block, spec.key, "k_norm", project(spec, block, "key", normed))
    parts = count if heads else 1
    asking, asked = (x.unflatten(-1, (parts, -1)).transpose(1, 2).float() for x in (query, keys))
    total = asked.new_zeros(len(asked), asked.shape[2])
    with torch.autocast(hidden.device.type, enabled=False):  # it would narrow what is to be compared
        for rows in asking.split(_ROWS, dim=2):
            logits = rows @ asked.transpose(2, 3) / math.sqrt(asked.shape[-1])
            total += logits.softmax(-1).sum((1, 2))
    attention = total / (parts * asking.shape[2])
    return attention[:, spec.prefix_tokens :], keys[:, spec.prefix_tokens :].unflatten(-1, (count, -1))


def over_tokens(values: Tensor, cells: Grid, tokens: Grid) -> Tensor:
    """(T, H*W, ...) of patches -> (T, h*w, ...), the mean over the patches under each token.

    Args:
        values: in raster order.
        cells: (H, W).
        tokens: (h, w).
    """
    if cells == tokens:
        return values
    raster = values.flatten(2) if values.ndim > 2 else values[..., None]
    raster = raster.transpose(1, 2).unflatten(2, cells).float()
    pooled = F.adaptive_avg_pool2d(raster, tokens).flatten(2).transpose(1, 2).to(values.dtype)
    return pooled.unflatten(2, values.shape[2:]) if values.ndim > 2 else pooled[..., 0]


def _normed(block: nn.Module, path: str | None, name: str, x: Tensor) -> Tensor:
    """Queries or keys of a block that normalises them over the full width (InternViT)."""
    if path is None:
        return x
    attention = find_module(block, path.rpartition(".")[0], "attention")
    norm = getattr(attention, name, None)
    normed: Tensor = x if norm is None else norm(x)
    return normed
