"""Cross-attention from tokens to cells; which cells a token sees is left to subclasses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vision_remember.grid import Grid
from vision_remember.interactions.base import Interaction, check_prepared
from vision_remember.interactions.fusion import FUSIONS
from vision_remember.interactions.levels import FeatureNorm, Features, level_widths, projected
from vision_remember.interactions.parts import attention_width, head_count, projection, split_heads, zero_last


class PreparedCells(NamedTuple):
    """Keys and values of an image; M = H*W, times the levels with fusion "tokens".

    Attributes:
        key: (B, heads, M, d).
        value: (B, heads, M, d), saliency already multiplied in.
        feature_grid: (H, W).
    """

    key: Tensor
    value: Tensor
    feature_grid: Grid


class CrossAttention(Interaction[PreparedCells]):
    """Queries from the tokens, keys and values from the features. A subclass implements :meth:`read`.

    Args:
        query_dim: D, width of the tokens.
        feature_dim: C, width of the features, all levels joined.
        attn_dim: width of the attention; "features" for C; None for D, at most 1024.
        num_heads: heads; None for heads of 64 channels (16 where the attention is narrower than 512).
        num_levels: encoder levels in the features, all of one width.
        level_dims: the width of each level, where they differ.
        fusion: an entry of ``FUSIONS``: how the levels of a cell are joined.
        feature_norm: layer norm over each level's channels, over all channels ("joint"), or none.
        query_layers: 1 for a linear query projection, 2 for an MLP with GELU.
        output_layers: the same for the output projection.
        inner_projections: a linear map of the attention's width behind the query projection and one before the output
            projection, as multi-head attention has them of its own.
        zero_init: start the last output layer at zero, so that the update is exactly zero.

    Raises:
        ValueError: a width that the heads do not divide, or an unknown option.
    """

    def __init__(
        self,
        query_dim: int,
        feature_dim: int,
        *,
        attn_dim: int | Literal["features"] | None = None,
        num_heads: int | None = None,
        num_levels: int = 1,
        level_dims: Sequence[int] | None = None,
        fusion: str = "concat",
        feature_norm: FeatureNorm = "per_level",
        query_layers: Literal[1, 2] = 1,
        output_layers: Literal[1, 2] = 1,
        inner_projections: bool = False,
        zero_init: bool = True,
    ) -> None:
        super().__init__(query_dim, feature_dim, level_widths(feature_dim, num_levels, level_dims))
        self.attn_dim = attention_width(attn_dim, query_dim, feature_dim)
        self.num_heads = head_count(num_heads, self.attn_dim)
        self.fusion = FUSIONS[fusion](self.level_dims, feature_norm)
        # Names that no usual LoRA target matches as a suffix. No bias on keys (it cancels in the softmax) nor on values
        # (the output's bias does the same): saliency before or after the projection is then one and the same.
        self.vr_query = projection(query_dim, self.attn_dim, query_layers)
        self.vr_key = self.fusion.linear(self.attn_dim)
        self.vr_value = self.fusion.linear(self.attn_dim)
        self.vr_out = projection(self.attn_dim, query_dim, output_layers)
        if inner_projections:
            self.vr_query = nn.Sequential(self.vr_query, nn.Linear(self.attn_dim, self.attn_dim, bias=False))
            self.vr_out = nn.Sequential(nn.Linear(self.attn_dim, self.attn_dim, bias=False), self.vr_out)
        if zero_init:
            zero_last(self.vr_out)

    def read(self, query: Tensor, key: Tensor, value: Tensor, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """(B, heads, h*w, d) queries; (B, heads, M, d) keys; (B, heads, M, d_v) values -> (B, heads, h*w, d_v)."""
        raise NotImplementedError

    def project(
        self, features: Features, saliency: Tensor | None, *, feature_grid: Grid, token_grid: Grid | None
    ) -> PreparedCells:
        """Keys and values of the cells; see :meth:`Interaction.prepare`."""
        key, value = self.keys_and_values(self.fusion(features), saliency)
        return PreparedCells(key, value, (feature_grid[0], feature_grid[1]))

    def keys_and_values(self, features: Features, saliency: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of cells whose levels are fused already."""
        key, value = projected(self.vr_key, features), projected(self.vr_value, features)
        return split_heads(key, self.num_heads), split_heads(self.weighted(value, saliency), self.num_heads)

    def weighted(self, value: Tensor, saliency: Tensor | None) -> Tensor:
        """Values times the saliency of their cells, (B, M, width)."""
        saliency = self.saliency_of_keys(saliency)
        return value if saliency is None else value * saliency.unsqueeze(-1).to(value.dtype)

    def saliency_of_keys(self, saliency: Tensor | None) -> Tensor | None:
        """(B, M), once for every level that has keys of its own."""
        levels = self.fusion.key_levels
        return saliency if saliency is None or levels == 1 else saliency.repeat(1, levels)

    def attend(self, tokens: Tensor, prepared: PreparedCells, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """The tokens' updates; see :meth:`Interaction.attend`."""
        grids = (prepared.feature_grid, feature_grid)
        check_prepared(tokens, prepared.key, prepared.key.shape[0], feature_grid=grids)
        query = split_heads(self.vr_query(tokens), self.num_heads)
        read = self.read(query, prepared.key, prepared.value, token_grid=token_grid, feature_grid=feature_grid)
        return self.vr_out(read.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def attention_weights(self, tokens: Tensor, features: Features, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """Where each token looks, for pictures.

        Args:
            tokens: (B, h*w, D), normalised as the block does it.
            features: (B, H*W, C), or one (B, H*W, c) per level.
            token_grid: (h, w).
            feature_grid: (H, W).

        Returns:
            (B, heads, h*w, H*W), rows sum to 1; zero for cells that a token does not see. The weight of a cell is that
            of all its levels.
        """
        query = split_heads(self.vr_query(tokens), self.num_heads)
        key = self.prepare(features, feature_grid=feature_grid).key
        # Attention over one-hot values is the attention map.
        one_hot = torch.eye(feature_grid[0] * feature_grid[1], dtype=query.dtype, device=query.device)
        one_hot = one_hot.repeat(self.fusion.key_levels, 1).expand(*key.shape[:2], -1, -1)
        return self.read(query, key, one_hot, token_grid=token_grid, feature_grid=feature_grid)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, width={self.attn_dim}"
