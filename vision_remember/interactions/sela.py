"""SELA, saliency-enhancing local attention: each token re-reads the cells under it (Vision Remember, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_remember.grid import Grid, check_count, check_grid
from vision_remember.interactions.absorbed import absorbed_attention, pays_off
from vision_remember.interactions.bank import keys_and_values, side_by_side
from vision_remember.interactions.cross_attention import CrossAttention
from vision_remember.interactions.fusion import Concat
from vision_remember.interactions.levels import (
    LEVEL_NORM_EPS,
    FeatureNorm,
    Features,
    LevelLinear,
    LevelNorm,
    is_plain,
    split_levels,
)
from vision_remember.interactions.parts import attention_width, head_count, split_heads
from vision_remember.interactions.region_cells import (
    PreparedRaster,
    PreparedRegions,
    RasterCells,
    RegionCells,
    regions_between,
)
from vision_remember.ops import BACKENDS, local_attention, region_bias
from vision_remember.ops.triton_local_attention import kernels_suit, triton_local_attention
from vision_remember.ops.triton_rows import can_join, join_normalised
from vision_remember.ops.windowed import attend_regions, merge_query_blocks, split_query_blocks

Position = Literal["specialised", "learned", "none"]

# Of its weight a head that starts on its own cell gives it e^3 / (e^3 + 3) = 87 %: three over the others in a region of
# 2x2 cells, more in a larger one, where there are more others to share with.
_OWN_CELL_ODDS = math.exp(3) / 3
_LEARNED_STD = 0.02


class SELA(CrossAttention):
    """Cross-attention from each token to the features of the cells under it, values weighted by saliency.

    Args:
        query_dim: D, width of the tokens.
        feature_dim: C, width of the features, all levels joined.
        attn_dim: width of the attention; "features" for C; None for D, at most 1024.
        num_heads: heads; None for heads of 64 channels (16 where the attention is narrower than 512), and with position
            "specialised" for one per cell at least, where that leaves them 8 channels.
        window: side k of the block of tokens that share a region; 1 gives every token its own.
        position: a learned bias per head for the place of a cell inside the region. "specialised" starts each head on
            a cell of its own, with 87 % of its weight: a start without a preference averages the region and was seen
            to stay there. "learned" starts near zero. "none" is the paper's text, which mentions no bias.
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
        absorb: attend to the features themselves, with the key projection drawn to the queries and the value projection
            to what was read: the same function in other order, with fewer products where a region has fewer queries
            than cells. True wherever grids divide evenly; "auto" where it was measured to pay off besides: without
            gradients, on a CPU; False to project every cell.

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
        absorb: bool | Literal["auto"] = False,
    ) -> None:
        check_grid("cells", cells)
        width = attention_width(attn_dim, query_dim, feature_dim)
        super().__init__(
            query_dim,
            feature_dim,
            attn_dim=width,
            num_heads=head_count(num_heads, width, math.prod(cells) if position == "specialised" else 1),
            num_levels=num_levels,
            level_dims=level_dims,
            fusion=fusion,
            feature_norm=feature_norm,
            query_layers=query_layers,
            output_layers=output_layers,
            inner_projections=inner_projections,
            zero_init=zero_init,
        )
        check_count("window", window)
        BACKENDS[backend]  # for its error: the earliest place to notice a typo
        if absorb not in (True, False, "auto"):
            raise ValueError(f"absorb={absorb!r}: expected True, False or 'auto'")
        if absorb and absorb != "auto" and self.fusion.key_levels > 1:
            raise ValueError(
                f"absorb=True: fusion {fusion!r} has a projection for each level; use absorb='auto' or False"
            )
        self.window = window
        self.backend = backend
        self.absorb = absorb
        self.position = _position_table(position, self.num_heads, window, cells, self.fusion.key_levels)

    def project(
        self, features: Features, saliency: Tensor | None, *, feature_grid: Grid, token_grid: Grid | None
    ) -> Any:
        """Keys and values of the cells, by regions where the grids allow; see :meth:`Interaction.prepare`."""
        cells = self.region_cells(features, saliency, feature_grid=feature_grid, token_grid=token_grid)
        if cells is None:
            return super().project(features, saliency, feature_grid=feature_grid, token_grid=token_grid)
        return self.project_regions(cells)

    @property
    def arrangement(self) -> tuple[Any, ...]:
        """What :meth:`region_cells` depends on: interactions of equal arrangement may share its result."""
        return self.window, self.backend, self.level_dims, self.fusion.norm.kind

    def reads_rasters(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether kernels will read cells of such a device and dtype where they lie, so that none are put in order."""
        if self.backend == "auto" and self.absorb is not True:
            return kernels_suit(device, dtype, self.attn_dim // self.num_heads, self.window)
        return self.backend == "triton"

    def region_cells(
        self,
        features: Features,
        saliency: Tensor | None,
        *,
        feature_grid: Grid,
        token_grid: Grid | None,
    ) -> RegionCells | None:
        """What of the preparation needs no weights: the normalised cells by regions; None for cells in raster order."""
        first = features if isinstance(features, Tensor) else features[0]
        if token_grid is None or self.backend == "naive" or self.reads_rasters(first.device, first.dtype):
            return None
        axes = regions_between(token_grid, feature_grid, self.window)
        if axes is None:
            return None
        # Into their order they have to be copied in any case, by one copy for all levels. With gradients they stay
        # apart: a backward pass would hold several tensors as large as all of them.
        cells = RegionCells.of(features, saliency, axes, token_grid, feature_grid, join=not torch.is_grad_enabled())
        return cells.holding(self.fusion.norm(cells.features))

    def project_regions(self, cells: RegionCells) -> RegionCells | PreparedRegions:
        """Keys and values of cells by regions; the fused cells themselves where the projections are absorbed."""
        features = self.fusion(cells.features, normed=True)
        if self._absorbs(features):
            return cells.holding(features, fused=True)
        key, value = self.keys_and_values(features, cells.saliency)
        return PreparedRegions(key, value, cells.token_grid, cells.feature_grid)

    @property
    def bankable(self) -> list[nn.Parameter]:
        """Key and value weights, where they tell all about the projections of cells; else none."""
        plain = type(self.fusion) is Concat and all(is_plain(m, LevelLinear) for m in (self.vr_key, self.vr_value))
        return [self.vr_key.weight, self.vr_value.weight] if plain else []  # type: ignore[list-item]

    @staticmethod
    def project_together(readers: Sequence[SELA], cells: RegionCells) -> list[RegionCells | PreparedRegions]:
        """:meth:`project_regions` of each; by one product where the weights stand side by side."""
        if not any(reader._absorbs(cells.features) for reader in readers):
            made = _by_one_product(readers, cells.features, cells.saliency)
            if made is not None:
                return [PreparedRegions(key, value, cells.token_grid, cells.feature_grid) for key, value in made]
        return [reader.project_regions(cells) for reader in readers]

    def raster_cells(self, levels: Sequence[Tensor], saliency: Tensor | None, *, feature_grid: Grid) -> RasterCells:
        """What of the preparation for kernels needs no weights: one product for all levels is worth a copy that joins
        them, once for all readers, also where gradients of the weights are wanted.

        Args:
            levels: one (B, H*W, c) each.
            saliency: (B, H*W), or None.
            feature_grid: (H, W).
        """
        norm = self.fusion.norm
        apart = tuple(level.shape[-1] for level in levels) == norm.level_dims
        if apart and is_plain(norm, LevelNorm) and norm.kind == "per_level" and can_join(levels):
            features = join_normalised(levels, LEVEL_NORM_EPS)
        else:
            features = norm(torch.cat(list(levels), dim=-1))
        return RasterCells(features, saliency, (feature_grid[0], feature_grid[1]))

    def project_raster(self, cells: RasterCells) -> PreparedRaster:
        """Keys and values of cells that stay in raster order."""
        key, value = self.keys_and_values(self.fusion(cells.features, normed=True), None)
        return PreparedRaster(key, value, self.saliency_of_keys(cells.saliency), cells.feature_grid)

    @staticmethod
    def project_rasters(readers: Sequence[SELA], cells: RasterCells) -> list[PreparedRaster]:
        """:meth:`project_raster` of each; by one product where the weights stand side by side. Without gradients."""
        made = _by_one_product(readers, cells.features, None)
        if made is None:
            return [reader.project_raster(cells) for reader in readers]
        return [
            PreparedRaster(key, value, reader.saliency_of_keys(cells.saliency), cells.feature_grid)
            for reader, (key, value) in zip(readers, made, strict=True)
        ]

    def read_raster(self, tokens: Tensor, prepared: PreparedRaster, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """(B, h*w, D) tokens -> (B, h*w, width), what :meth:`attend` gives to the output projection."""
        prepared.check(tokens, feature_grid)
        query = split_heads(self.vr_query(tokens), self.num_heads)
        read = triton_local_attention(
            query,
            prepared.key,
            prepared.value,
            query_grid=token_grid,
            key_grid=feature_grid,
            key_levels=self.fusion.key_levels,
            window=self.window,
            saliency=prepared.saliency,
            bias=self._bias(query, token_grid, feature_grid),
        )
        return read.transpose(1, 2).flatten(2)

    def attend(self, tokens: Tensor, prepared: Any, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """The tokens' updates; see :meth:`Interaction.attend`."""
        if isinstance(prepared, RasterCells):
            prepared = self.project_raster(prepared)
        if isinstance(prepared, PreparedRaster):
            return self.vr_out(self.read_raster(tokens, prepared, token_grid=token_grid, feature_grid=feature_grid))
        if isinstance(prepared, RegionCells) and not prepared.fused:
            prepared = self.project_regions(prepared)
        if not isinstance(prepared, (RegionCells, PreparedRegions)):
            return super().attend(tokens, prepared, token_grid=token_grid, feature_grid=feature_grid)
        prepared.check(tokens, token_grid, feature_grid, self.window)
        query = split_heads(self.vr_query(tokens), self.num_heads)
        query = split_query_blocks(query, token_grid, self.window)
        bias = self._bias(query, token_grid, feature_grid)
        if isinstance(prepared, PreparedRegions):
            per_image = query.shape[0] // max(1, tokens.shape[0])
            read = attend_regions(query, prepared.key, prepared.value, bias, per_image=per_image)
        else:
            key_weight: Tensor = self.vr_key.weight  # type: ignore[assignment]
            value_weight: Tensor = self.vr_value.weight  # type: ignore[assignment]
            levels = split_levels(prepared.features, self.fusion.out_dims)
            read = absorbed_attention(query, levels, key_weight, value_weight, saliency=prepared.saliency, bias=bias)
        read = merge_query_blocks(read, token_grid, self.window)
        return self.vr_out(read.transpose(1, 2).flatten(2))

    def read(self, query: Tensor, key: Tensor, value: Tensor, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """Softmax over the cells under each token; see :meth:`CrossAttention.read`."""
        return local_attention(
            query,
            key,
            value,
            query_grid=token_grid,
            key_grid=feature_grid,
            key_levels=self.fusion.key_levels,
            window=self.window,
            bias=self._bias(query, token_grid, feature_grid),
            backend=self.backend,
        )

    def _bias(self, query: Tensor, token_grid: Grid, feature_grid: Grid) -> Tensor | None:
        if self.position is None:
            return None
        bias = region_bias(self.position, query_grid=token_grid, key_grid=feature_grid, window=self.window)
        # under autocast the queries are narrower than the parameters
        bias = bias.to(query.dtype)
        levels = self.fusion.key_levels
        return bias if levels == 1 else torch.cat(bias.chunk(levels), dim=-1)

    def _absorbs(self, features: Features) -> bool:
        # A stranger in a projection's place, a LoRA or quantised layer, is called, not looked into.
        if not self.absorb or not all(is_plain(module, LevelLinear) for module in (self.vr_key, self.vr_value)):
            return False
        if self.absorb != "auto":
            return True
        first = features if isinstance(features, Tensor) else features[0]
        inference = first.device.type == "cpu" and not torch.is_grad_enabled()
        return inference and pays_off(self.window**2, first.shape[1], self.attn_dim // self.num_heads)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, backend={self.backend!r}"


def _by_one_product(
    readers: Sequence[SELA], features: Features, saliency: Tensor | None
) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values of each, where the weights stand side by side; else None."""
    own = [reader.bankable for reader in readers]
    # On a CPU one product takes as long as its parts, and copies of a model, whose weights stand apart, would differ
    # from it in the last bits.
    if not (isinstance(features, Tensor) and features.is_cuda and all(own)):
        return None
    bank = side_by_side([weight for weights in own for weight in weights])
    if bank is None:
        return None
    return keys_and_values(features, bank, saliency, [reader.num_heads for reader in readers])


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
        others = table[0, 0].numel() - 1
        table[entry, query, own_row, own_column] = math.log(max(1, others) * _OWN_CELL_ODDS)
    else:
        raise ValueError(f"position={position!r}: expected 'specialised', 'learned' or 'none'")
    return nn.Parameter(table)
