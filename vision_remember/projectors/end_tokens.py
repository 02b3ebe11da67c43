"""Tokens behind those of the image's grid, learned and the same for every image (Honeybee's end-of-sequence tokens)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_remember.grid import check_count


class EndTokens(nn.Module):
    """Puts learned tokens behind those of each image.

    Args:
        count: how many; with none there is no parameter.
        dim: E, their width.

    Raises:
        ValueError: a negative count.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        check_count("end_tokens", count, lowest=0)
        self.tokens = nn.Parameter(torch.empty(count, dim)) if count else None
        if self.tokens is not None:
            nn.init.trunc_normal_(self.tokens, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, E) -> (B, N + count, E)."""
        if self.tokens is None:
            return tokens
        return torch.cat((tokens, self.tokens.to(tokens.dtype).expand(len(tokens), -1, -1)), dim=1)
