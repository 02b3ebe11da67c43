"""The vision tokens of an image look at each other, in both directions (our reading of the paper's second version)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.interactions.parts import attention_width, head_count, split_heads

TokenMixerKind = Literal["self", "text_guided"]

_NORM_EPS = 1e-6


class TokenMixer(nn.Module):
    """Self-attention over the vision tokens of each image, without a causal mask.

    The second version of arXiv 2506.03928 names, in its abstract, a "Token Bidirectional Self-Attention Layer" beside
    the cross-attention, over vision tokens and a "text-guided token". We know no equations of it: the form, the place
    (after the read) and the making of the text's token are ours. In a decoder's causal attention a token sees only
    those before it in raster order; here each sees all of its image.

    Args:
        query_dim: D, width of the tokens.
        kind: "self"; or "text_guided": one more key and value, a projection of what the caller says the text is.
        num_heads: heads; None for heads of 64 channels (16 where the attention is narrower than 512).
        zero_init: start the output layer at zero, so that the update is exactly zero.

    Raises:
        ValueError: an unknown kind, or a width that the heads do not divide.
    """

    def __init__(
        self,
        query_dim: int,
        kind: TokenMixerKind = "self",
        *,
        num_heads: int | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if kind not in ("self", "text_guided"):
            raise ValueError(f"token_mixer={kind!r}: expected 'self', 'text_guided' or None")
        self.query_dim, self.kind = query_dim, kind
        width = attention_width(None, query_dim, query_dim)
        self.num_heads = head_count(num_heads, width)
        self.norm = nn.RMSNorm(query_dim, eps=_NORM_EPS)
        if kind == "text_guided":
            self.text_norm = nn.RMSNorm(query_dim, eps=_NORM_EPS)
            self.vr_text = nn.Linear(query_dim, query_dim)
        self.vr_query = nn.Linear(query_dim, width)
        self.vr_key = nn.Linear(query_dim, width, bias=False)
        self.vr_value = nn.Linear(query_dim, width, bias=False)
        self.vr_out = nn.Linear(width, query_dim)
        if zero_init:
            nn.init.zeros_(self.vr_out.weight)
            nn.init.zeros_(self.vr_out.bias)

    def forward(self, tokens: Tensor, *, text: Tensor | None = None, present: Tensor | None = None) -> Tensor:
        """The update of each token, without the residual.

        Args:
            tokens: (B, N, D), the vision tokens of each image, normalised here.
            text: (B, D), what stands for the text beside each image, for kind "text_guided".
            present: (B, N), bool: the tokens that exist, where a part of the grid has none (unpadded tiles). The others
                are seen by themselves alone, and their own updates mean nothing. None for all.

        Returns:
            (B, N, D).

        Raises:
            ValueError: no text where it is needed, text where it is not, or shapes that do not fit together.
        """
        self._check(tokens, text, present)
        tokens = self.norm(tokens)
        seen = tokens
        if text is not None:
            seen = torch.cat((tokens, self.vr_text(self.text_norm(text)).unsqueeze(1)), dim=1)
        mask = None
        if present is not None:
            itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
            mask = F.pad(present.unsqueeze(1) | itself, (0, seen.shape[1] - tokens.shape[1]), value=True).unsqueeze(1)
        query, key, value = (
            split_heads(x, self.num_heads) for x in (self.vr_query(tokens), self.vr_key(seen), self.vr_value(seen))
        )
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        update: Tensor = self.vr_out(read.transpose(1, 2).flatten(2))
        return update

    def _check(self, tokens: Tensor, text: Tensor | None, present: Tensor | None) -> None:
        if text is None and self.kind == "text_guided":
            raise ValueError(f"token_mixer='text_guided' needs text=, (B, D) = {(len(tokens), self.query_dim)}")
        if text is not None and self.kind != "text_guided":
            raise ValueError(f"text was given, but token_mixer={self.kind!r} has no use for it")
        if text is not None and tuple(text.shape) != (len(tokens), self.query_dim):
            raise ValueError(f"text {tuple(text.shape)}: expected (B, D) = {(len(tokens), self.query_dim)}")
        if present is not None and (present.shape != tokens.shape[:2] or present.dtype != torch.bool):
            raise ValueError(
                f"present {tuple(present.shape)} {present.dtype}: expected bool (B, N) = {tuple(tokens.shape[:2])}"
            )

    def extra_repr(self) -> str:
        return f"{self.kind!r}, heads={self.num_heads}"
