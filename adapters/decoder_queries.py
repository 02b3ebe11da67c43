"""What a few queries of a decoder layer attend to, computed from the layer's input before it runs.

Only the rows that are asked for are made, so the layer itself stays on fused attention.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

READABLE = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3")
"""Decoders whose attention is that of their projections, norms and rotary function, as the tests show."""


@torch.no_grad()
def query_attention(
    layer: nn.Module,
    hidden: Tensor,
    places: Tensor,
    rotary: tuple[Tensor, Tensor],
    visible: Tensor,
    known: Tensor | None = None,
) -> Tensor:
    """(B, heads, Q, m), attention weights of Q queries over m tokens. Never with gradient: they choose, no more.

    Args:
        layer: a layer of a decoder in ``READABLE``.
        hidden: (B, m, D), its input.
        places: (B, Q), which of the m tokens ask.
        rotary: cosines and sines, each (B or 1, m, d).
        visible: (B, Q, p + m), what each query may look at: keys in the cache first, then the m tokens.
        known: (B, key heads, p, d), keys that the cache holds already.
    """
    attention: Any = layer.self_attn
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    normed: Tensor = layer.input_layernorm(hidden)  # type: ignore[operator]
    asking = _take(normed, places)
    query = _heads(attention, "q", asking)
    key = _heads(attention, "k", normed)
    cos, sin = (table.to(hidden.device).expand(len(hidden), -1, -1) for table in rotary)
    query, _ = rotate(query, query, _take(cos, places), _take(sin, places))
    _, key = rotate(key, key, cos, sin)
    past = 0
    if known is not None:
        past, key = known.shape[2], torch.cat([known.to(key), key], dim=2)
    groups = query.shape[1] // key.shape[1]
    with torch.autocast(hidden.device.type, enabled=False):  # it would narrow what is to be compared
        logits = query.unflatten(1, (-1, groups)).float() @ key[:, :, None].float().transpose(-1, -2)
        logits = logits * attention.scaling
    logits = logits.flatten(1, 2).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    return logits.softmax(-1)[..., past:]


def check_readable(model_type: str) -> None:
    """Raises ValueError unless the attention of such a decoder can be recomputed."""
    if model_type not in READABLE:
        raise ValueError(
            f"this pruner reads a decoder layer's attention, which is known for {', '.join(READABLE)}, not for "
            f"{model_type!r}; pruners that read the vision encoder and the controls do without"
        )


def _heads(attention: Any, which: str, x: Tensor) -> Tensor:
    """(B, m, D) -> (B, heads, m, d), projected and normalised."""
    heads = getattr(attention, f"{which}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    return (heads if norm is None else norm(heads)).transpose(1, 2)


def _take(values: Tensor, places: Tensor) -> Tensor:
    """(B, m, D) and (B, Q) -> (B, Q, D)."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))
