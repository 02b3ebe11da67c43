"""LLaVA-1.5's projector: two linear layers, no compression (arXiv 2310.03744); and the base of those around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from vision_remember.grid import Grid
from vision_remember.projectors.base import Projector
from vision_remember.projectors.checkpoints import renamed


class MLPProjector(Projector):
    """Base of projectors that hold LLaVA's MLP and pool before or after it.

    Its layers are named like those of LLaVA's projector in transformers, so that one loads into the other.

    Args:
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio.
        act: "gelu" or "gelu_tanh", between the two linear layers.
        bias: whether the linear layers have a bias.

    Raises:
        ValueError: an unknown ``act``.
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

    def mlp(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., D)."""
        return self.linear_2(self.act(self.linear_1(features)))

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of LLaVA's original release under our names.

        Args:
            state_dict: those of ``mm_projector``, a sequence of Linear, GELU and Linear, without that prefix.

        Raises:
            ValueError: a weight of another module.
        """
        return renamed(state_dict, {"0": "linear_1", "2": "linear_2"})


class MLP(MLPProjector):
    """One token per feature: (B, H*W, C) -> (B, H*W, D) by Linear, GELU and Linear.

    The arguments are those of :class:`MLPProjector`; a ratio other than 1, or an ``out_grid`` other than the features'
    own, is an error of :meth:`out_grid`.
    """

    def out_grid(self, grid: Grid) -> Grid:
        out_grid = super().out_grid(grid)
        if out_grid != (grid[0], grid[1]):
            raise ValueError(
                f"the MLP keeps the features' grid {grid[0]}x{grid[1]} and cannot make {out_grid[0]}x{out_grid[1]}; "
                "take a projector that compresses, such as 'adaptive_avg_pool'"
            )
        return out_grid

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        return self.mlp(features)
