"""Attention density: how much a kind of token is looked at, for its share of the sequence (Vision Remember, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionDensity:
    """Densities by decoder layer, sample and head; 1 is a uniform share, 0 is never looked at.

    NaN stands where there is nothing to measure: vision and system tokens of a sample without images, samples without a
    query, layers without attention.

    Attributes:
        vision: (layers, B, heads), of the image tokens.
        text: (layers, B, heads), of the text behind the first image token; in a sample without images of all text.
        system: (layers, B, heads), of what stands in front of the first image token.
        queries: (B,), the query positions that the densities are means over.
    """

    vision: Tensor
    text: Tensor
    system: Tensor
    queries: Tensor

    def per_layer(self, group: str = "vision") -> Tensor:
        """(layers,), the mean over heads and over the samples that have such tokens: the curve of the paper.

        Args:
            group: "vision", "text" or "system".

        Raises:
            ValueError: another group.
        """
        if group not in ("vision", "text", "system"):
            raise ValueError(f"group={group!r}: expected 'vision', 'text' or 'system'")
        densities: Tensor = getattr(self, group)
        return densities.flatten(1).nanmean(1)


@dataclass(frozen=True)
class TokenGroups:
    """Which positions of the sequences are what; padding is in no group.

    Attributes:
        vision: (B, S) bool, image tokens.
        text: (B, S) bool, text behind the first image token; all text of a sample without images.
        system: (B, S) bool, text in front of the first image token.
    """

    vision: Tensor
    text: Tensor
    system: Tensor

    @property
    def tokens(self) -> Tensor:
        """(B, S) bool, everything but padding."""
        return self.vision | self.text | self.system


def token_groups(vision: Tensor, tokens: Tensor | None = None) -> TokenGroups:
    """The groups of a batch.

    Args:
        vision: (B, S) bool, where image tokens stand.
        tokens: (B, S), nonzero where there is no padding; None if there is none.

    Raises:
        ValueError: shapes that differ.
    """
    real = torch.ones_like(vision) if tokens is None else tokens.bool()
    if vision.ndim != 2 or real.shape != vision.shape:
        raise ValueError(f"vision {tuple(vision.shape)}, tokens {tuple(real.shape)}: expected the same (B, S)")
    vision = vision & real
    seen = vision.cumsum(1) > 0
    behind = seen | ~seen[:, -1:]
    return TokenGroups(vision, real & behind & ~vision, real & ~behind)


def density(
    weights: Tensor,
    group: Tensor,
    visible: Tensor,
    *,
    queries: Tensor | None = None,
    tokens: Tensor | None = None,
    causal_correction: bool = True,
) -> Tensor:
    """Attention density of a group of tokens (Vision Remember, eq. 1), mean over the queries.

    For one query, ``density = sum of its weights on the group / (N / L)``: the group's attention over the group's share
    of the sequence. The equation itself is lost in the text that circulates; its words say that the attention of vision
    tokens "has been divided by the proportion of vision tokens". They name neither query nor head.

    Args:
        weights: (B, heads, Q, S), attention after the softmax, rows of Q queries.
        group: (B, S) bool, the tokens in question.
        visible: (B, Q, S) bool, the positions that each query may look at: the attention mask.
        queries: (B, Q) bool, the rows that count; None for all.
        tokens: (B, S) bool, what is no padding, for ``causal_correction=False``; None for all positions.
        causal_correction: count N and L among the positions that the query can see, so that uniform attention has
            density 1 wherever the query stands and whatever the layer's window is. Otherwise count them in the whole
            sequence, which for the last query of a layer with full attention is the same.

    Returns:
        (B, heads). NaN where no query counts that has such tokens to look at.

    Raises:
        ValueError: shapes that do not fit.
    """
    samples, _, rows, length = weights.shape if weights.ndim == 4 else (0, 0, 0, 0)
    if weights.ndim != 4 or group.shape != (samples, length) or visible.shape != (samples, rows, length):
        raise ValueError(
            f"weights {tuple(weights.shape)}, group {tuple(group.shape)}, visible {tuple(visible.shape)}: expected "
            "(B, heads, Q, S), (B, S) and (B, Q, S)"
        )
    for name, mask, shape in (("queries", queries, (samples, rows)), ("tokens", tokens, (samples, length))):
        if mask is not None and mask.shape != shape:
            raise ValueError(f"{name} {tuple(mask.shape)}: expected {shape}, as weights are {tuple(weights.shape)}")
    weights = weights.float() if weights.dtype.itemsize < 4 else weights
    attended = torch.einsum("bhqs,bs->bhq", weights, group.to(weights.dtype))
    if causal_correction:
        members, everything = (visible & group[:, None]).sum(-1), visible.sum(-1)
    else:
        tokens = torch.ones_like(group) if tokens is None else tokens
        members, everything = (kind.sum(-1, keepdim=True).expand(-1, rows) for kind in (group & tokens, tokens))
    counts = members > 0 if queries is None else (members > 0) & queries
    proportion = (members.to(weights.dtype) / everything).where(counts, torch.ones_like(attended[:, 0]))
    each = (attended / proportion[:, None]).where(counts[:, None], torch.zeros_like(attended))
    # 0/0 is the NaN of samples in which nothing counts.
    return each.sum(-1) / counts.sum(-1)[:, None]
