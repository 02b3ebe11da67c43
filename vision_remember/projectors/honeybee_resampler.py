"""Honeybee's resampler: six layers in which learned queries attend to themselves and the features (2312.06742)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.grid import Grid, check_count, count_or
from vision_remember.projectors.attention import Attention
from vision_remember.projectors.base import Projector
from vision_remember.projectors.checkpoints import renamed, taken
from vision_remember.projectors.end_tokens import EndTokens
from vision_remember.projectors.tables import learned_query_grid, resampled

_STD = 0.02
_GATED_NORM_EPS = 1e-6
_HEAD_DIM = 64

# the layers' modules in the release, below ``encoder.layers.<i>.crossattention``, and ours
_LAYER_PARTS = {
    "attention.query": "attention.query",
    "attention.key": "attention.key",
    "attention.value": "attention.value",
    "output.out_proj": "attention.out",
    "norm1": "query_norm",
    "normk": "feature_norm",
    "output.norm2": "feed_forward_norm",
    "output.mlp.w1": "feed_forward.gate",
    "output.mlp.w3": "feed_forward.value",
    "output.mlp.ffn_ln": "feed_forward.norm",
    "output.mlp.w2": "feed_forward.out",
}


class GatedFeedForward(nn.Module):
    """``W2 LN(SiLU(W1 u) * W3 u)``: (B, N, E) -> (B, N, E).

    Args:
        dim: E.
        hidden_dim: inner width.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim)
        self.value = nn.Linear(dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, eps=_GATED_NORM_EPS)
        self.out = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(F.silu(self.gate(x)) * self.value(x)))


class HoneybeeResamplerLayer(nn.Module):
    """Attention of the queries to themselves and the features, then a gated feed-forward.

    The attention is added to the *normalised* queries, as released, and not to the queries themselves.

    Args:
        dim: E.
        ffn_dim: inner width of the feed-forward.
        num_heads: heads, a divisor of E.
    """

    def __init__(self, dim: int, ffn_dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim)
        self.feature_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = GatedFeedForward(dim, ffn_dim)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """(B, N, E) queries and (B, H*W, E) features -> (B, N, E)."""
        queries = self.query_norm(queries)
        seen = torch.cat((queries, self.feature_norm(features)), dim=1)
        queries = queries + self.attention(queries, seen, seen)
        return queries + self.feed_forward(self.feed_forward_norm(queries))


class HoneybeeResampler(Projector):
    """The resampler that Honeybee compares its abstractors with: (B, H*W, C) -> (B, h*w, D).

    Nothing but the encoder's own positions tells where a feature is: any permutation of the features gives the same
    tokens. The queries are laid out on a grid, but stand for no cells of it. Honeybee drops attention weights in
    training (0.1), and starts the queries at zero, all alike; here nothing is dropped, and they start apart.

    Args:
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio; the release has 64 tokens, (8, 8).
        query_grid: (rows, columns) that the learned queries are laid out for; other token grids interpolate them. None
            for ``out_grid``, or 12x12 where a ratio is given.
        hidden_dim: E, width of the layers; None for C.
        ffn_dim: inner width of their feed-forward; None for 4E.
        num_layers: layers.
        num_heads: heads of each attention; None for heads of about 64 channels.
        end_tokens: learned tokens behind those of the image; see :class:`Projector`.

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
        hidden_dim: int | None = None,
        ffn_dim: int | None = None,
        num_layers: int = 6,
        num_heads: int | None = None,
        end_tokens: int = 0,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid)
        check_count("num_layers", num_layers)
        width = count_or("hidden_dim", hidden_dim, in_dim)
        self.ffn_dim = count_or("ffn_dim", ffn_dim, 4 * width)
        default_heads = next(n for n in range(max(1, width // _HEAD_DIM), 0, -1) if width % n == 0)
        self.num_heads = count_or("num_heads", num_heads, default_heads)
        self.query_grid = learned_query_grid(query_grid, self.fixed_grid)
        self.queries = nn.Parameter(torch.empty(self.query_grid[0] * self.query_grid[1], width))
        self.features = nn.Linear(in_dim, width)
        self.layers = nn.ModuleList(
            HoneybeeResamplerLayer(width, self.ffn_dim, num_heads=self.num_heads) for _ in range(num_layers)
        )
        self.out = nn.Linear(width, out_dim)
        self.end_tokens, self.end = end_tokens, EndTokens(end_tokens, out_dim)
        nn.init.normal_(self.queries, std=_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_STD)
                nn.init.zeros_(module.bias)

    def options(self) -> dict[str, Any]:
        return {
            **super().options(),
            "query_grid": self.query_grid,
            "hidden_dim": self.out.in_features,
            "ffn_dim": self.ffn_dim,
            "num_layers": len(self.layers),
            "num_heads": self.num_heads,
            "end_tokens": self.end_tokens,
        }

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        memory = self.features(features)
        queries = resampled(self.queries, self.query_grid, out_grid).expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, memory)
        return self.end(self.out(queries))

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of Honeybee's release under our names.

        Args:
            state_dict: those of its ``abstractor``, without that prefix.

        Raises:
            ValueError: a weight of another module, or no queries.
        """
        imported = {"queries": taken(state_dict, "query_tokens")[0]}
        rest = {name: weight for name, weight in state_dict.items() if name != "query_tokens"}
        if "vit_eos" in rest:
            imported["end.tokens"] = rest.pop("vit_eos")[0]
        names = {"visual_input_fc": "features", "visual_output_fc": "out"}
        for module in {key.rpartition(".")[0] for key in rest}:
            in_layer = re.fullmatch(r"encoder\.layers\.(\d+)\.crossattention\.(.+)", module)
            if in_layer and in_layer[2] in _LAYER_PARTS:
                names[module] = f"layers.{in_layer[1]}.{_LAYER_PARTS[in_layer[2]]}"
        return imported | renamed(rest, names)
