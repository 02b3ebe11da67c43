"""Adaptive average pooling, then an MLP: the projector of the paper (section 4.4) and of DeCo."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import Grid
from vision_remember.projectors.mlp import MLPProjector


def average_pooled(features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
    """(B, H*W, C) on ``grid`` -> (B, h*w, C): the mean of the cells under each token, equal blocks or not."""
    cells = features.transpose(1, 2).unflatten(2, grid)  # (B, C, H, W)
    return F.adaptive_avg_pool2d(cells, out_grid).flatten(2).transpose(1, 2)


class AdaptiveAvgPool(MLPProjector):
    """Averages the features under each token, then maps them to the decoder's width.

    Its layers are named like those of LLaVA's projector, so that a LLaVA checkpoint's projector loads into it.

    Args:
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio; any grid up to the features' own.
        act: "gelu" or "gelu_tanh", between the two linear layers.
        bias: whether the linear layers have a bias.
    """

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        return self.mlp(average_pooled(features, grid, out_grid))
