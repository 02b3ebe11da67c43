"""SELA, saliency-enhancing local attention: each token re-reads the cells under it (Vision Remember, section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vision_remember.grid import Grid, check_grid
from vision_remember.interactions.cross_attention import CrossAttention
from vision_remember.interactions.levels import FeatureNorm
from vision_remember.ops import BACKENDS, local_attention, region_bias

Position = Literal["specialised", "learned", "none"]

# A head that starts on its own cell of a 2x2 region gives it e^3 / (e^3 + 3) = 87 % of its weight.
_OWN_CELL_LOGIT = 3.0
_LEARNED_STD = 0.02


class SELA(CrossAttention):
    """Cross-attention from each token to the features of the cells under it, values weighted by saliency.

    Args:
        query_dim: D, width of the tokens.
        feature_dim: C, width of the features, all levels joined.
        attn_dim: width of the attention; "features" for C; None for D, at most 1024.
        num_heads: heads; None for heads of 64 channels (16 where the attention is narrower than 512).
        window: side k of the block of tokens that share a region; 1 gives every token its own.
        position: a learned bias per head for the place of a cell inside the region. "specialised" starts each head on
            a cell of its own: a start without a preference averages the region and was seen to stay there. "learned"
            starts near zero. "none" is the paper's text, which mentions no bias.
        cells: cells per token (rows, columns) that the position table is laid out for; other regions interpolate it.
            "specialised" needs at least rows * columns heads to cover each cell.
        num_levels: encoder levels in the features, all of one width.
        level_dims: the width of each level, where they differ.
        fusion: an entry of ``FUSIONS``: how the levels of a cell are joined.
        feature_norm: layer norm over each level's channels, over all channels ("joint"), or none.
        query_layers: 1 for a linear query projection, 2 for an MLP with GELU.
        output_layers: the same for the output projection.
        inner_projections: a linear map of the attention's width behind the query projection and one before the output
            projection, as multi-head attention has them of its own.
        zero_init: start the last output layer at zero, so that the update is exactly zero.
        backend: back-end of :func:`vision_remember.local_attention`.

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
        window: int = 1,
        position: Position = "specialised",
        cells: Grid = (2, 2),
        num_levels: int = 1,
        level_dims: Sequence[int] | None = None,
        fusion: str = "concat",
        feature_norm: FeatureNorm = "per_level",
        query_layers: Literal[1, 2] = 1,
        output_layers: Literal[1, 2] = 1,
        inner_projections: bool = False,
        zero_init: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            query_dim,
            feature_dim,
            attn_dim=attn_dim,
            num_heads=num_heads,
            num_levels=num_levels,
            level_dims=level_dims,
            fusion=fusion,
            feature_norm=feature_norm,
            query_layers=query_layers,
            output_layers=output_layers,
            inner_projections=inner_projections,
            zero_init=zero_init,
        )
        if window < 1:
            raise ValueError(f"window={window}: expected a positive number of tokens per block side")
        check_grid("cells", cells)
        BACKENDS[backend]  # for its error: the earliest place to notice a typo
        self.window = window
        self.backend = backend
        self.position = _position_table(position, self.num_heads, window, cells, self.fusion.key_levels)

    def read(self, query: Tensor, key: Tensor, value: Tensor, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """Softmax over the cells under each token; see :meth:`CrossAttention.read`."""
        bias = None
        if self.position is not None:
            bias = region_bias(self.position, query_grid=token_grid, key_grid=feature_grid, window=self.window)
            # under autocast the queries are narrower than the parameters
            bias = torch.cat(bias.to(query.dtype).chunk(self.fusion.key_levels), dim=-1)
        return local_attention(
            query,
            key,
            value,
            query_grid=token_grid,
            key_grid=feature_grid,
            key_levels=self.fusion.key_levels,
            window=self.window,
            bias=bias,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, backend={self.backend!r}"


def _position_table(position: Position, heads: int, window: int, cells: Grid, key_levels: int) -> nn.Parameter | None:
    """(levels*heads, k*k, k*rows, k*columns), one entry per head, query of the block and cell of its region.

    With fusion "tokens" each level has a table of its own, all the same at the start.
    """
    if position == "none":
        return None
    rows, columns = cells
    table = torch.zeros(key_levels * heads, window * window, window * rows, window * columns)
    if position == "learned":
        nn.init.normal_(table, std=_LEARNED_STD)
    elif position == "specialised":
        entry, query = torch.arange(key_levels * heads)[:, None], torch.arange(window * window)
        own = entry % heads % math.prod(cells)
        own_row = query // window * rows + own // columns
        own_column = query % window * columns + own % columns
        table[entry, query, own_row, own_column] = _OWN_CELL_LOGIT
    else:
        raise ValueError(f"position={position!r}: expected 'specialised', 'learned' or 'none'")
    return nn.Parameter(table)
