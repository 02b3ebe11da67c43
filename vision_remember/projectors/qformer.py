"""Q-Former: learned queries that talk to each other and read the features (BLIP-2, arXiv 2301.12597)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vision_remember.grid import Grid, check_count
from vision_remember.projectors.attention import Attention, mlp
from vision_remember.projectors.base import Projector
from vision_remember.projectors.checkpoints import taken
from vision_remember.projectors.tables import learned_query_grid, resampled

_NORM_EPS = 1e-12
_INIT_STD = 0.02

# transformers' names inside a layer -> ours
_LAYER_PARTS = {
    **{
        f"{theirs}.{inner}": f"{ours}_{outer}"
        for theirs, ours in (("attention", "self"), ("crossattention", "cross"))
        for inner, outer in (
            ("attention.query", "attention.query"),
            ("attention.key", "attention.key"),
            ("attention.value", "attention.value"),
            ("output.dense", "attention.out"),
            ("output.LayerNorm", "norm"),
        )
    },
    "intermediate_query.dense": "feed_forward.0",
    "output_query.dense": "feed_forward.2",
    "output_query.LayerNorm": "feed_forward_norm",
}


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention in some layers, feed-forward; each added to its input and normalised after it.

    Args:
        dim: E, width of the queries.
        feature_dim: C, width of the features; None for a layer without cross-attention.
        num_heads: heads of the attentions.
        dropout: share of each branch's output that training drops.
    """

    def __init__(self, dim: int, feature_dim: int | None, *, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(dim, num_heads)
        self.self_norm = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.cross_attention = None
        if feature_dim is not None:
            self.cross_attention = Attention(dim, num_heads, source_dim=feature_dim)
            self.cross_norm = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.feed_forward = mlp(dim, 4 * dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """(B, Q, E), reading features (B, H*W, C) -> (B, Q, E)."""
        queries = self.self_norm(queries + self.dropout(self.self_attention(queries, queries, queries)))
        if self.cross_attention is not None:
            queries = self.cross_norm(queries + self.dropout(self.cross_attention(queries, features, features)))
        return self.feed_forward_norm(queries + self.dropout(self.feed_forward(queries)))


class QFormer(Projector):
    """BLIP-2's stack of BERT layers over learned queries, without its text branch, then a linear layer to the decoder.

    It gives features no positions: only what the encoder left in them says where they lie. BLIP-2's 32 queries are
    ``out_grid=(4, 8)``; the grid counts them, it does not place them.

    Args:
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio.
        query_grid: (rows, columns) that the learned queries are laid out for; other token grids interpolate them. None
            for ``out_grid``, or 12x12 where a ratio is given.
        hidden_dim: E, width of the queries.
        num_layers: layers.
        num_heads: heads of each attention.
        cross_every: every how many layers, from the first, a layer reads the features.
        dropout: share of each branch's output that training drops; BLIP-2 trains with 0.1.

    Raises:
        ValueError: heads that do not divide the width, or no layer.
    """

    spatial: ClassVar[bool] = False

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        query_grid: Grid | None = None,
        hidden_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        cross_every: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid)
        for option, count in (("hidden_dim", hidden_dim), ("num_layers", num_layers), ("cross_every", cross_every)):
            check_count(option, count)
        self.num_heads, self.cross_every, self.dropout = num_heads, cross_every, dropout
        self.query_grid = learned_query_grid(query_grid, self.fixed_grid)
        self.queries = nn.Parameter(torch.empty(self.query_grid[0] * self.query_grid[1], hidden_dim))
        self.query_norm = nn.LayerNorm(hidden_dim, eps=_NORM_EPS)
        self.layers = nn.ModuleList(
            QFormerLayer(hidden_dim, None if i % cross_every else in_dim, num_heads=num_heads, dropout=dropout)
            for i in range(num_layers)
        )
        self.out = nn.Linear(hidden_dim, out_dim)
        # BLIP-2 starts its queries at zero, all alike: then nothing could ever tell them apart.
        nn.init.normal_(self.queries, std=_INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INIT_STD)
                nn.init.zeros_(module.bias)

    def options(self) -> dict[str, Any]:
        return {
            **super().options(),
            "query_grid": self.query_grid,
            "hidden_dim": self.out.in_features,
            "num_layers": len(self.layers),
            "num_heads": self.num_heads,
            "cross_every": self.cross_every,
            "dropout": self.dropout,
        }

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        queries = self.query_norm(resampled(self.queries, self.query_grid, out_grid)).expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        return self.out(queries)

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a BLIP-2 of transformers, under our names.

        Args:
            state_dict: of the whole model, or its parts ``query_tokens``, ``qformer`` and ``language_projection``. What
                belongs to other parts, or to the text branch, is dropped.

        Raises:
            ValueError: no queries.
        """
        imported = {"queries": taken(state_dict, "query_tokens")[0]}
        for name, weight in state_dict.items():
            if name.startswith("language_projection."):
                imported[name.replace("language_projection", "out")] = weight
            elif name.startswith("qformer.layernorm."):
                imported[name.replace("qformer.layernorm", "query_norm")] = weight
            elif name.startswith("qformer.encoder.layer."):
                _, _, _, layer, part = name.split(".", maxsplit=4)
                module, _, leaf = part.rpartition(".")
                if module in _LAYER_PARTS:
                    imported[f"layers.{layer}.{_LAYER_PARTS[module]}.{leaf}"] = weight
        return imported
