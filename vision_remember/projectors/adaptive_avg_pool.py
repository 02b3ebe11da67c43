"""Adaptive average pooling, then an MLP: the projector of the paper (section 4.1) and of DeCo."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.grid import Grid
from vision_remember.projectors.base import Projector


class AdaptiveAvgPool(Projector):
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

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        act: Literal["gelu", "gelu_tanh"] = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid)
        if act not in ("gelu", "gelu_tanh"):
            raise ValueError(f"act={act!r}: expected 'gelu' or 'gelu_tanh'")
        self.linear_1 = nn.Linear(in_dim, out_dim, bias=bias)
        self.act = nn.GELU(approximate="tanh" if act == "gelu_tanh" else "none")
        self.linear_2 = nn.Linear(out_dim, out_dim, bias=bias)

    def options(self) -> dict[str, Any]:
        act = "gelu_tanh" if self.act.approximate == "tanh" else "gelu"
        return {**super().options(), "act": act, "bias": self.linear_1.bias is not None}

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        cells = features.transpose(1, 2).unflatten(2, grid)  # (B, C, H, W)
        pooled = F.adaptive_avg_pool2d(cells, out_grid).flatten(2).transpose(1, 2)
        return self.linear_2(self.act(self.linear_1(pooled)))
