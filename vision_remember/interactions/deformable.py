"""Deformable cross-attention: each token reads a few places of its choice on each level (Deformable DETR, eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vision_remember.grid import Grid, check_count
from vision_remember.interactions.base import Interaction, check_prepared
from vision_remember.interactions.fusion import FUSIONS
from vision_remember.interactions.levels import FeatureNorm, Features, level_widths, split_levels
from vision_remember.interactions.parts import attention_width, head_count, projection, zero_last
from vision_remember.ops import deformable_sample


class PreparedLevels(NamedTuple):
    """Values of an image.

    Attributes:
        values: one (B, H*W, heads, d) per level, saliency already multiplied in.
        feature_grid: (H, W).
    """

    values: tuple[Tensor, ...]
    feature_grid: Grid


class DeformableAttention(Interaction[PreparedLevels]):
    """Samples each level at learned offsets around the middle of the token's cells.

    An offset of one is a quarter of the token's span, so that with r = 2 the four cells under a token lie at offsets of
    one. Heads start in evenly spaced directions, their points one step after the other, whatever the token is.

    Args:
        query_dim: D, width of the tokens.
        feature_dim: C, width of the features, all levels joined.
        attn_dim: width of the values; "features" for C; None for D, at most 1024.
        num_heads: heads; None for heads of 64 channels (16 where the width is below 512).
        num_points: places per head and level.
        num_levels: encoder levels in the features, all of one width.
        level_dims: the width of each level, where they differ.
        fusion: an entry of ``FUSIONS``. It samples each level that comes out by itself, one softmax over the
            points of all of them, so "concat" and "tokens" are one and the same here.
        feature_norm: layer norm over each level's channels, over all channels ("joint"), or none.
        query_layers: 1: offsets and weights are linear in the token; 2: an MLP with GELU comes first.
        output_layers: 1 for a linear output projection, 2 for an MLP with GELU.
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
        num_points: int = 4,
        num_levels: int = 1,
        level_dims: Sequence[int] | None = None,
        fusion: str = "concat",
        feature_norm: FeatureNorm = "per_level",
        query_layers: Literal[1, 2] = 1,
        output_layers: Literal[1, 2] = 1,
        zero_init: bool = True,
    ) -> None:
        super().__init__(query_dim, feature_dim, level_widths(feature_dim, num_levels, level_dims))
        check_count("num_points", num_points)
        self.attn_dim = attention_width(attn_dim, query_dim, feature_dim)
        self.num_heads = head_count(num_heads, self.attn_dim)
        self.fusion = FUSIONS[fusion](self.level_dims, feature_norm)
        self.num_points, self.num_levels = num_points, len(self.fusion.out_dims)
        if query_layers not in (1, 2):
            raise ValueError(f"{query_layers} layers in a projection: expected 1 or 2")
        hidden = query_dim if query_layers == 1 else self.attn_dim
        self.vr_query = nn.Identity() if query_layers == 1 else nn.Sequential(nn.Linear(query_dim, hidden), nn.GELU())
        places = self.num_heads * self.num_levels * num_points
        self.vr_offsets = nn.Linear(hidden, 2 * places)
        self.vr_weights = nn.Linear(hidden, places)
        self.vr_values = nn.ModuleList(nn.Linear(width, self.attn_dim, bias=False) for width in self.fusion.out_dims)
        self.vr_out = projection(self.attn_dim, query_dim, output_layers)
        self._start(zero_init)

    def project(
        self, features: Features, saliency: Tensor | None, *, feature_grid: Grid, token_grid: Grid | None
    ) -> PreparedLevels:
        """Values of the cells, level by level; see :meth:`Interaction.prepare`."""
        levels = split_levels(self.fusion(features), self.fusion.out_dims)
        values = [project(level) for project, level in zip(self.vr_values, levels, strict=True)]
        if saliency is not None:
            values = [value * saliency.unsqueeze(-1).to(value.dtype) for value in values]
        apart = tuple(value.unflatten(-1, (self.num_heads, -1)) for value in values)
        return PreparedLevels(apart, (feature_grid[0], feature_grid[1]))

    def attend(self, tokens: Tensor, prepared: PreparedLevels, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """The weighted sum of the sampled values; see :meth:`Interaction.attend`."""
        first, grids = prepared.values[0], (prepared.feature_grid, feature_grid)
        check_prepared(tokens, first, first.shape[0], feature_grid=grids)
        places = (self.num_heads, self.num_levels, self.num_points)
        query = self.vr_query(tokens)
        weights = self.vr_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1).unflatten(-1, places[1:])
        h, w = token_grid
        # float32: half precision is too coarse for a place on a large grid.
        offsets = self.vr_offsets(query).to(torch.promote_types(query.dtype, torch.float32)).unflatten(-1, (*places, 2))
        centres = _centres(token_grid, like=offsets)[:, None, None, None]
        # Each axis by a plain number: a tensor of both would have to be copied to the device on every call.
        x, y = offsets.unbind(-1)
        steps = torch.stack((x / (4 * w), y / (4 * h)), dim=-1)
        locations = centres + steps
        read = deformable_sample(prepared.values, locations, weights, grids=[feature_grid] * self.num_levels)
        return self.vr_out(read.flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, width={self.attn_dim}, points={self.num_points}"

    @torch.no_grad()
    def _start(self, zero_init: bool) -> None:
        nn.init.zeros_(self.vr_offsets.weight)
        nn.init.zeros_(self.vr_weights.weight)
        nn.init.zeros_(self.vr_weights.bias)
        # Half a step off the axes, so that four heads point at the four cells of r = 2.
        angles = (torch.arange(self.num_heads) + 0.5) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)[:, None]
        start = (directions[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
        self.vr_offsets.bias.copy_(start.flatten())
        if zero_init:
            zero_last(self.vr_out)


def _centres(grid: Grid, like: Tensor) -> Tensor:
    """(h*w, 2), the middle of each token as (x, y) in fractions of the image."""
    h, w = grid
    y = (torch.arange(h, dtype=like.dtype, device=like.device) + 0.5) / h
    x = (torch.arange(w, dtype=like.dtype, device=like.device) + 0.5) / w
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
