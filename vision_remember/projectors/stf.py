"""STF and MBTF: eight encoder levels fused per feature, then 2x2 features per token (arXiv 2506.07138)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vision_remember.grid import Grid, count_or
from vision_remember.projectors.attention import mlp
from vision_remember.projectors.blocks import BlockProjector, Fit
from vision_remember.projectors.checkpoints import renamed


class STF(BlockProjector):
    """Two MLPs (Linear, GELU, Linear) with a space-to-depth between them: (B, H*W, 8C) -> (B, h*w, D).

    Multi-block token fusion: 8C -> 4C -> C on every feature, the deepest level first. Spatial token fusion: the blocks'
    features on channels, channel by channel as ``torch.pixel_unshuffle`` orders them, then 4C -> 16C -> D. No norm and
    no residual, as released.

    Args:
        in_dim: C, width of one level.
        out_dim: D, width of the decoder.
        ratio: features per token; the release has 4. See :class:`Projector`.
        out_grid: (h, w) instead of a ratio.
        block: cells (rows, columns) per token; see :class:`BlockProjector`.
        fit: "error", "pad" or "resize", for grids that do not divide; see :class:`BlockProjector`.
        fusion_dim: width inside the first MLP; None for 4C.
        hidden_dim: width inside the second MLP; None for 16C.

    Raises:
        ValueError: an unknown fit.
    """

    encoder_levels: ClassVar[tuple[int, ...]] = (23, 21, 18, 15, 12, 9, 6, 3)

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        block: Grid | None = None,
        fit: Fit = "error",
        fusion_dim: int | None = None,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid, block=block, fit=fit)
        self.fusion_dim = count_or("fusion_dim", fusion_dim, 4 * in_dim)
        self.hidden_dim = count_or("hidden_dim", hidden_dim, 16 * in_dim)
        self.fusion = mlp(self.feature_dim, self.fusion_dim, in_dim)
        self.mlp = mlp(self.block[0] * self.block[1] * in_dim, self.hidden_dim, out_dim)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "fusion_dim": self.fusion_dim, "hidden_dim": self.hidden_dim}

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        return self.mlp(self.joined(self.fusion(features), grid, out_grid, "channel_major"))

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of LLaVA-STF's release under our names.

        Args:
            state_dict: those of ``mm_projector_crosslayer`` and ``mm_projector``, these prefixes included.

        Raises:
            ValueError: a weight of another module.
        """
        parts = {"mm_projector_crosslayer": "fusion", "mm_projector": "mlp"}
        return renamed(state_dict, {f"{their}.{i}": f"{our}.{i}" for their, our in parts.items() for i in (0, 2)})
