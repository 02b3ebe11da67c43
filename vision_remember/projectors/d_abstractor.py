"""D-Abstractor: a deformable decoder that condenses an image into a grid of tokens (Honeybee, arXiv 2312.06742)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.grid import Grid, check_count, check_grid, count_or
from vision_remember.projectors.attention import Attention
from vision_remember.projectors.base import Projector
from vision_remember.projectors.checkpoints import renamed, taken
from vision_remember.projectors.deformable_attention import DeformableAttention, axis_places, raster_points
from vision_remember.projectors.end_tokens import EndTokens
from vision_remember.projectors.tables import learned_query_grid, resampled

_STD = 0.02

# the layers' modules in Honeybee's release, which are those of transformers' Deformable DETR, and ours
_LAYER_PARTS = {
    "self_attn.q_proj": "self_attention.query",
    "self_attn.k_proj": "self_attention.key",
    "self_attn.v_proj": "self_attention.value",
    "self_attn.out_proj": "self_attention.out",
    "self_attn_layer_norm": "self_norm",
    "encoder_attn.sampling_offsets": "cross_attention.offsets",
    "encoder_attn.attention_weights": "cross_attention.weights",
    "encoder_attn.value_proj": "cross_attention.value",
    "encoder_attn.output_proj": "cross_attention.out",
    "encoder_attn_layer_norm": "cross_norm",
    "fc1": "feed_forward.0",
    "fc2": "feed_forward.2",
    "final_layer_norm": "feed_forward_norm",
}


class DAbstractorLayer(nn.Module):
    """Self-attention, deformable cross-attention, feed-forward; each added to its input and normalised after it."""

    def __init__(self, dim: int, ffn_dim: int, *, num_heads: int, num_points: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(dim, num_heads)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(dim, num_heads, num_points)
        self.cross_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        memory: Tensor,
        *,
        references: Tensor,
        step: tuple[float, float],
        grid: Grid,
    ) -> Tensor:
        """(B, h*w, E) queries -> (B, h*w, E); see :class:`DeformableAttention` for the rest.

        Args:
            queries: (B, h*w, E).
            positions: (B, h*w, E), added where queries are compared or choose places, never to what is passed on.
            memory: (B, H*W, E).
            references: (h*w, 2).
            step: see :class:`DeformableAttention`.
            grid: (H, W).
        """
        placed = queries + positions
        queries = self.self_norm(queries + self.dropout(self.self_attention(placed, placed, queries)))
        read = self.cross_attention(queries + positions, memory, references=references, step=step, grid=grid)
        queries = self.cross_norm(queries + self.dropout(read))
        return self.feed_forward_norm(queries + self.dropout(self.feed_forward(queries)))


class DAbstractor(Projector):
    """Learned queries, placed by the pooled features under them, look around their place in the image for six layers.

    The reference points start evenly spaced, from the first to the last cell's centre of the features, and are learned
    as shifts from there, so that they mean the same on every grid. Tables of queries and positions are interpolated
    where a grid is not the one that they are laid out for.

    Args:
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio.
        query_grid: (rows, columns) that the learned queries are laid out for. None for ``out_grid``, or 12x12 where a
            ratio is given.
        position_grid: (rows, columns) of features that the learned positions are laid out for.
        hidden_dim: E, width of the decoder layers; None for C.
        ffn_dim: inner width of their feed-forward; None for E.
        num_layers: layers.
        num_heads: heads of each attention.
        num_points: points per head of the deformable attention.
        dropout: share of each branch's output that training drops; Honeybee trains with 0.1.
        end_tokens: learned tokens behind those of the image; see :class:`Projector`.

    Raises:
        ValueError: heads that do not divide the width, no layer or no points.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        query_grid: Grid | None = None,
        position_grid: Grid = (24, 24),
        hidden_dim: int | None = None,
        ffn_dim: int | None = None,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        dropout: float = 0.0,
        end_tokens: int = 0,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid)
        check_grid("position_grid", position_grid)
        check_count("num_layers", num_layers)
        width = count_or("hidden_dim", hidden_dim, in_dim)
        self.ffn_dim = count_or("ffn_dim", ffn_dim, width)
        self.num_heads, self.num_points, self.dropout = num_heads, num_points, dropout
        self.position_grid = (position_grid[0], position_grid[1])
        self.query_grid = learned_query_grid(query_grid, self.fixed_grid)
        queries = self.query_grid[0] * self.query_grid[1]
        self.features = nn.Identity() if width == in_dim else nn.Linear(in_dim, width)
        self.positions = nn.Parameter(torch.empty(position_grid[0] * position_grid[1], width))
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.reference_shifts = nn.Parameter(torch.zeros(queries, 2))
        self.layers = nn.ModuleList(
            DAbstractorLayer(width, self.ffn_dim, num_heads=num_heads, num_points=num_points, dropout=dropout)
            for _ in range(num_layers)
        )
        self.end_tokens, self.end = end_tokens, EndTokens(end_tokens, width)
        self.out = nn.Linear(width, out_dim)
        nn.init.trunc_normal_(self.positions, std=_STD)
        nn.init.normal_(self.queries, std=_STD)

    def options(self) -> dict[str, Any]:
        return {
            **super().options(),
            "query_grid": self.query_grid,
            "position_grid": self.position_grid,
            "hidden_dim": self.out.in_features,
            "ffn_dim": self.ffn_dim,
            "num_layers": len(self.layers),
            "num_heads": self.num_heads,
            "num_points": self.num_points,
            "dropout": self.dropout,
            "end_tokens": self.end_tokens,
        }

    def references(self, grid: Grid, out_grid: Grid) -> Tensor:
        """(h*w, 2), where each token starts to look, as (x, y); 0 to 1 spans the image. In float32 at the least."""
        starts = _reference_starts(grid, out_grid, like=self.reference_shifts)
        return starts + resampled(self.reference_shifts, self.query_grid, out_grid)

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        memory = self.features(features) + resampled(self.positions, self.position_grid, grid)
        raster = memory.transpose(1, 2).unflatten(2, grid)  # (B, E, H, W)
        positions = F.adaptive_avg_pool2d(raster, out_grid).flatten(2).transpose(1, 2)
        queries = resampled(self.queries, self.query_grid, out_grid).expand(len(features), -1, -1)
        references = self.references(grid, out_grid)
        step = (1 / grid[1], 1 / grid[0])  # an offset counts cells
        for layer in self.layers:
            queries = layer(queries, positions, memory, references=references, step=step, grid=grid)
        return self.out(self.end(queries))

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of Honeybee's release under our names: of one level, with pooled features for positions.

        Its learned reference points become shifts from where they start. Build with the ``query_grid``,
        ``position_grid`` and layers that it has.

        Args:
            state_dict: those of its ``abstractor``, without that prefix. A position for the CLS token is dropped.

        Raises:
            ValueError: a weight of another module, or no queries, positions or reference points.
        """
        queries = taken(state_dict, "query_position_embeddings.weight")
        positions, references = (taken(state_dict, name)[0] for name in ("v_pos_emb", "reference_points"))
        side, out_side = math.isqrt(len(positions)), math.isqrt(len(queries))
        starts = _reference_starts((side, side), (out_side, out_side), like=references)
        imported = {"queries": queries, "positions": positions[-side * side :], "reference_shifts": references - starts}
        own = ("query_position_embeddings.weight", "v_pos_emb", "reference_points")
        rest = {name: weight for name, weight in state_dict.items() if name not in own}
        if "eos_tokens" in rest:
            imported["end.tokens"] = rest.pop("eos_tokens")[0]
        names = {"input_proj.0": "features", "output_proj": "out"}
        for module in {key.rpartition(".")[0] for key in rest}:
            in_layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
            if in_layer and in_layer[2] in _LAYER_PARTS:
                names[module] = f"layers.{in_layer[1]}.{_LAYER_PARTS[in_layer[2]]}"
        return imported | renamed(rest, names)


def _reference_starts(grid: Grid, out_grid: Grid, like: Tensor) -> Tensor:
    """(h*w, 2), evenly spaced from the first to the last cell's centre."""
    (H, W), (h, w) = grid, out_grid
    rows, columns = axis_places(0.5 / H, 1 - 0.5 / H, h, like), axis_places(0.5 / W, 1 - 0.5 / W, w, like)
    return raster_points(rows, columns)
