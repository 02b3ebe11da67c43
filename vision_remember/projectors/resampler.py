"""Cross-attention resampler with sin-cos positions: Qwen-VL (arXiv 2308.12966) and MiniCPM-V (arXiv 2408.01800)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vision_remember.grid import Grid, count_or
from vision_remember.projectors.attention import Attention, unfused_attention
from vision_remember.projectors.base import Projector
from vision_remember.projectors.checkpoints import renamed, taken
from vision_remember.projectors.tables import learned_query_grid, resampled

_NORM_EPS = 1e-6
_HEAD_DIM = 128

Positions = Literal["cells", "shared"]


def sincos_positions(grid: Grid, dim: int, *, device: torch.device | None = None) -> Tensor:
    """(H*W, dim) fixed positions: sines, then cosines of the column in the first half, of the row in the second.

    Args:
        grid: (H, W).
        dim: channels, a multiple of four; wavelengths grow from 2π to 20000π cells over a quarter of them.
        device: where to make them.
    """
    rows, columns = (torch.arange(side, dtype=torch.float32, device=device) for side in grid)
    frequencies = 10_000 ** (-torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))

    def encoded(places: Tensor) -> Tensor:
        angles = places[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    by_column, by_row = encoded(columns).repeat(grid[0], 1), encoded(rows).repeat_interleave(grid[1], dim=0)
    return torch.cat((by_column, by_row), dim=1)


class Resampler(Projector):
    """Learned queries attend once to all features; only keys know where they are. No residual and no feed-forward.

    The width of the attention is the decoder's, D. The queries are laid out on a grid, but nothing ties a query to the
    cells under it.

    Args:
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder, a multiple of four.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio.
        query_grid: (rows, columns) that the learned queries are laid out for; other token grids interpolate them. None
            for ``out_grid``, or 12x12 where a ratio is given.
        num_heads: heads of the attention; None for heads of about 128 channels.
        positions: "cells", a key's row and column, and no position for the queries (MiniCPM-V 2.5 and later: any grid,
            any aspect); "shared", the positions of the query grid, for the queries as they are and for the keys
            stretched over the features (Qwen-VL).

    Raises:
        ValueError: a width that is no multiple of four or that the heads do not divide, or unknown ``positions``.
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
        num_heads: int | None = None,
        positions: Positions = "cells",
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid)
        if out_dim % 4:
            raise ValueError(f"out_dim={out_dim}: sin-cos positions in two dimensions need a multiple of four")
        if positions not in ("cells", "shared"):
            raise ValueError(f"positions={positions!r}: expected 'cells' or 'shared'")
        self.positions = positions
        self.query_grid = learned_query_grid(query_grid, self.fixed_grid)
        self.queries = nn.Parameter(torch.empty(self.query_grid[0] * self.query_grid[1], out_dim))
        self.features = nn.Identity() if in_dim == out_dim else nn.Linear(in_dim, out_dim, bias=False)
        self.query_norm = nn.LayerNorm(out_dim, eps=_NORM_EPS)
        self.feature_norm = nn.LayerNorm(out_dim, eps=_NORM_EPS)
        self.attention = Attention(out_dim, count_or("num_heads", num_heads, _default_heads(out_dim)))
        self.out_norm = nn.LayerNorm(out_dim, eps=_NORM_EPS)
        self.out = nn.Linear(out_dim, out_dim, bias=False)
        # Equal queries would stay equal for ever: nothing else tells the tokens apart.
        nn.init.normal_(self.queries, std=0.02)
        nn.init.normal_(self.out.weight, std=out_dim**-0.5)

    def options(self) -> dict[str, Any]:
        own = {"query_grid": self.query_grid, "num_heads": self.attention.num_heads, "positions": self.positions}
        return {**super().options(), **own}

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        value = self.feature_norm(self.features(features))
        query = self.query_norm(resampled(self.queries, self.query_grid, out_grid))
        if self.positions == "cells":
            key_positions = sincos_positions(grid, self.out_dim, device=value.device)
        else:
            query_positions = sincos_positions(out_grid, self.out_dim, device=value.device)
            key_positions = resampled(query_positions, out_grid, grid)
            query = query + query_positions.to(query.dtype)
        key = value + key_positions.to(value.dtype)
        read = self.attention(query.expand(len(features), -1, -1), key, value)
        return self.out(self.out_norm(read))

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of MiniCPM-V's resampler, or of Qwen-VL's with the norm and matrix after it, under our names.

        Args:
            state_dict: the resampler's part of a checkpoint, without the prefix of the model around it. Fixed position
                tables in it are dropped: they are computed.

        Raises:
            ValueError: a weight of another module, or no queries, no last matrix or no attention.
        """
        state = {name.removeprefix("attn_pool."): weight for name, weight in state_dict.items()}
        names = {"kv_proj": "features", "ln_q": "query_norm", "ln_kv": "feature_norm", "ln_post": "out_norm"}
        own = ("query", "proj", "pos_embed")
        rest = {name: weight for name, weight in state.items() if name not in own and not name.startswith("attn.")}
        imported = renamed(rest, names) | unfused_attention(state, "attn", "attention")
        # their last matrix multiplies from the right
        return {"queries": taken(state, "query"), "out.weight": taken(state, "proj").T} | imported


def _default_heads(width: int) -> int:
    """As many heads as leave at least 128 channels each and divide the width."""
    return next(heads for heads in range(max(1, width // _HEAD_DIM), 0, -1) if width % heads == 0)
