"""Features projected and added, whatever the token holds: DeepStack (arXiv 2406.04334), in Qwen3-VL's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import Grid, check_grid
from vision_remember.interactions.base import Interaction, check_prepared
from vision_remember.interactions.fusion import FUSIONS
from vision_remember.interactions.levels import (
    FeatureNorm,
    Features,
    LevelLinear,
    level_widths,
    projected,
    split_levels,
)
from vision_remember.interactions.parts import attention_width, projection, zero_last


class PreparedLevels(NamedTuple):
    """Cells of an image, normed and fused.

    Attributes:
        levels: one (B, H*W, c) per level, saliency already multiplied in.
        feature_grid: (H, W).
    """

    levels: tuple[Tensor, ...]
    feature_grid: Grid


class DeepStack(Interaction[PreparedLevels]):
    """Adds to each token a projection of the cells under it: ``x + MLP([c_1; ...; c_n])``. No token asks for anything.

    The rival that attention has to beat: the same levels, the same region, the same places in the decoder, but what is
    added depends on the image alone. The cells under a token are laid one after the other, as in Qwen3-VL's patch
    merger, so that the MLP can tell them apart; ``cells=(1, 1)`` averages them. In DeepStack and Qwen3-VL each decoder
    layer has a level of its own, here each block reads all of them.

    Args:
        query_dim: D, width of the tokens.
        feature_dim: C, width of the features, all levels joined.
        attn_dim: width between the MLP's two layers; "features" for C; None for D, at most 1024.
        cells: cells per token (rows, columns) that are told apart; where a token has another number of them, they are
            averaged to this one by adaptive pooling's rule.
        num_levels: encoder levels in the features, all of one width.
        level_dims: the width of each level, where they differ.
        fusion: an entry of ``FUSIONS``. The MLP reads every level that comes out, so "concat" and "tokens" are one and
            the same here.
        feature_norm: layer norm over each level's channels, over all channels ("joint"), or none.
        output_layers: linear layers behind the first one and its GELU, 1 or 2.
        zero_init: start the last output layer at zero, so that the update is exactly zero.

    Raises:
        ValueError: an unknown option, or cells that are no grid.
    """

    reads_tokens: ClassVar[bool] = False

    def __init__(
        self,
        query_dim: int,
        feature_dim: int,
        *,
        attn_dim: int | Literal["features"] | None = None,
        cells: Grid = (2, 2),
        num_levels: int = 1,
        level_dims: Sequence[int] | None = None,
        fusion: str = "concat",
        feature_norm: FeatureNorm = "per_level",
        output_layers: Literal[1, 2] = 1,
        zero_init: bool = True,
    ) -> None:
        super().__init__(query_dim, feature_dim, level_widths(feature_dim, num_levels, level_dims))
        check_grid("cells", cells)
        self.cells = cells
        self.hidden_dim = attention_width(attn_dim, query_dim, feature_dim)
        self.fusion = FUSIONS[fusion](self.level_dims, feature_norm)
        # Names that no usual LoRA target matches as a suffix.
        self.vr_in = LevelLinear(cells[0] * cells[1] * sum(self.fusion.out_dims), self.hidden_dim)
        self.vr_out = projection(self.hidden_dim, query_dim, output_layers)
        if zero_init:
            zero_last(self.vr_out)

    def project(
        self, features: Features, saliency: Tensor | None, *, feature_grid: Grid, token_grid: Grid | None
    ) -> PreparedLevels:
        """The cells, level by level; see :meth:`Interaction.prepare`."""
        levels = split_levels(self.fusion(features), self.fusion.out_dims)
        if saliency is not None:
            levels = [level * saliency[..., None].to(level.dtype) for level in levels]
        return PreparedLevels(tuple(levels), (feature_grid[0], feature_grid[1]))

    def attend(self, tokens: Tensor, prepared: PreparedLevels, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """What each token is given; see :meth:`Interaction.attend`."""
        first, grids = prepared.levels[0], (prepared.feature_grid, feature_grid)
        check_prepared(tokens, first, first.shape[0], feature_grid=grids)
        under = [self._under(level, token_grid, feature_grid) for level in prepared.levels]
        update: Tensor = self.vr_out(F.gelu(projected(self.vr_in, under)))
        return update

    def _under(self, level: Tensor, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """(B, H*W, c) -> (B, h*w, rows*columns*c), the cells under each token in raster order."""
        (h, w), (rows, columns) = token_grid, self.cells
        fine = level.unflatten(1, feature_grid)
        if feature_grid != (h * rows, w * columns):
            fine = F.adaptive_avg_pool2d(fine.permute(0, 3, 1, 2), (h * rows, w * columns)).permute(0, 2, 3, 1)
        blocks = fine.unflatten(2, (w, columns)).unflatten(1, (h, rows))
        return blocks.transpose(2, 3).flatten(3).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"cells={self.cells[0]}x{self.cells[1]}, width={self.hidden_dim}"
