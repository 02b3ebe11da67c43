"""Global attention: each token attends to all cells of its image (Vision Remember, section 4.3, a baseline there)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import Grid
from vision_remember.interactions.cross_attention import CrossAttention


class GlobalAttention(CrossAttention):
    """Cross-attention from each token to every cell, values weighted by saliency.

    For comparison: its cost grows with tokens times cells, and nothing tells a token which cells it stands for but the
    features themselves. It takes the arguments of :class:`CrossAttention`.
    """

    local = False

    def read(self, query: Tensor, key: Tensor, value: Tensor, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """Softmax over all cells; see :meth:`CrossAttention.read`."""
        return F.scaled_dot_product_attention(query, key, value)
