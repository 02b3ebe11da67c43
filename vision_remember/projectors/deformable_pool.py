"""Pooling that looks around: after the adaptive deformable transformation of MoME (arXiv 2407.12709), as we read it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.grid import Grid, check_count, count_or
from vision_remember.projectors.attention import mlp
from vision_remember.projectors.base import Projector
from vision_remember.projectors.deformable_attention import DeformableAttention, axis_places, raster_points


class DeformablePoolLayer(nn.Module):
    """Deformable cross-attention, then a feed-forward; each reads its input normalised and adds to it."""

    def __init__(self, dim: int, ffn_dim: int, *, num_heads: int, num_points: int) -> None:
        super().__init__()
        # Without weights: the linear layers that follow absorb them, and the offsets' start would leave them idle.
        self.attention_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = DeformableAttention(dim, num_heads, num_points)
        self.feed_forward_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.feed_forward = mlp(dim, ffn_dim, dim)

    def forward(
        self, tokens: Tensor, memory: Tensor, *, references: Tensor, step: tuple[float, float], grid: Grid
    ) -> Tensor:
        """(B, h*w, E) tokens over (B, H*W, E) -> (B, h*w, E); see :class:`DeformableAttention`."""
        read = self.attention(self.attention_norm(tokens), memory, references=references, step=step, grid=grid)
        tokens = tokens + read
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))


class DeformablePool(Projector):
    """Pools the features under each token, then lets it sample the features at places of its own choice.

    MoME says that its transformation joins adaptive average pooling with deformable cross-attention to the same map;
    neither its code nor depth, norms, widths or start are public. This is one reading of that for one encoder, not a
    reproduction: pre-norm layers without self-attention, a reference at the centre of a token's cells, and points that
    start inside them, the outermost on their border. MoME's router, which mixes several encoders by the instruction, is
    not part of it.

    Args:
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio.
        hidden_dim: E, width of the layers; None for C.
        ffn_dim: inner width of their feed-forward; None for E.
        num_layers: layers; 0 leaves the pooling between two linear layers.
        num_heads: heads of the deformable attention.
        num_points: points per head.

    Raises:
        ValueError: heads that do not divide the width, or no points.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        hidden_dim: int | None = None,
        ffn_dim: int | None = None,
        num_layers: int = 2,
        num_heads: int = 8,
        num_points: int = 4,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid)
        check_count("num_layers", num_layers, lowest=0)
        width = count_or("hidden_dim", hidden_dim, in_dim)
        self.ffn_dim = count_or("ffn_dim", ffn_dim, width)
        self.num_heads, self.num_points = num_heads, num_points
        self.features = nn.Linear(in_dim, width)
        self.layers = nn.ModuleList(
            DeformablePoolLayer(width, self.ffn_dim, num_heads=num_heads, num_points=num_points)
            for _ in range(num_layers)
        )
        self.out = nn.Linear(width, out_dim)

    def options(self) -> dict[str, Any]:
        return {
            **super().options(),
            "hidden_dim": self.out.in_features,
            "ffn_dim": self.ffn_dim,
            "num_layers": len(self.layers),
            "num_heads": self.num_heads,
            "num_points": self.num_points,
        }

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        memory = self.features(features)
        raster = memory.transpose(1, 2).unflatten(2, grid)  # (B, E, H, W)
        tokens = F.adaptive_avg_pool2d(raster, out_grid).flatten(2).transpose(1, 2)
        h, w = out_grid
        rows, columns = (axis_places(0.5 / side, 1 - 0.5 / side, side, memory) for side in (h, w))
        references = raster_points(rows, columns)
        # Offsets start at 1 .. num_points: the last one then lies on the border of the token's own h x w-th.
        step = (0.5 / (w * self.num_points), 0.5 / (h * self.num_points))
        for layer in self.layers:
            tokens = layer(tokens, memory, references=references, step=step, grid=grid)
        return self.out(tokens)
