"""Cells prepared once per image: in the order of their regions, so that no layer copies them, or as they lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vision_remember.grid import Grid
from vision_remember.interactions.base import check_prepared
from vision_remember.interactions.levels import Features
from vision_remember.ops.regions import AxisRegions
from vision_remember.ops.windowed import to_regions


def regions_between(token_grid: Grid, feature_grid: Grid, window: int) -> tuple[AxisRegions, AxisRegions] | None:
    """The regions of both axes where they tile the cells; None where they overlap or differ in size."""
    rows, columns = (AxisRegions(*sides, window) for sides in zip(token_grid, feature_grid, strict=True))
    return (rows, columns) if rows.even and columns.even else None


class RegionCells(NamedTuple):
    """The cells of B images, region by region: R = B * regions, n cells in each.

    Attributes:
        features: (R, n, C), the levels joined, or one (R, n, c) per level.
        saliency: (R, n), or None.
        token_grid: (h, w) of the tokens whose regions these are.
        feature_grid: (H, W) of the images.
        fused: whether the levels are fused.
    """

    features: Features
    saliency: Tensor | None
    token_grid: Grid
    feature_grid: Grid
    fused: bool = False

    @classmethod
    def of(
        cls,
        features: Features,
        saliency: Tensor | None,
        axes: tuple[AxisRegions, AxisRegions],
        token_grid: Grid,
        feature_grid: Grid,
        *,
        join: bool = False,
    ) -> RegionCells:
        """Features in raster order, (B, H*W, C) or one (B, H*W, c) per level, and saliency (B, H*W), by regions.

        They are copied into their order; with ``join`` by one copy for all levels, which then stand in one tensor.
        """
        ordered: Features
        if isinstance(features, Tensor):
            ordered = _by_regions(to_regions(features, *axes))
        elif join:
            ordered = _by_regions(torch.cat([to_regions(level, *axes) for level in features], dim=-1))
        else:
            ordered = [_by_regions(to_regions(level, *axes)) for level in features]
        if saliency is not None:
            saliency = _by_regions(to_regions(saliency.unsqueeze(-1), *axes)).squeeze(-1)
        return cls(ordered, saliency, (token_grid[0], token_grid[1]), (feature_grid[0], feature_grid[1]))

    def holding(self, features: Features, *, fused: bool = False) -> RegionCells:
        """The same cells with other features."""
        # Not by _replace, into which the oldest torch's compiler does not look.
        return RegionCells(features, self.saliency, self.token_grid, self.feature_grid, fused)

    def check(self, tokens: Tensor, token_grid: Grid, feature_grid: Grid, window: int) -> None:
        """Raises ValueError unless these are the regions of (B, h*w, D) ``tokens``."""
        first = self.features if isinstance(self.features, Tensor) else self.features[0]
        _check_regions(self, first, tokens, token_grid, feature_grid, window)


class PreparedRegions(NamedTuple):
    """Keys and values of B images, region by region.

    Attributes:
        key: (R, heads, n, d).
        value: (R, heads, n, d), saliency already multiplied in.
        token_grid: (h, w) of the tokens whose regions these are.
        feature_grid: (H, W) of the images.
    """

    key: Tensor
    value: Tensor
    token_grid: Grid
    feature_grid: Grid

    def check(self, tokens: Tensor, token_grid: Grid, feature_grid: Grid, window: int) -> None:
        """Raises ValueError unless these are the regions of (B, h*w, D) ``tokens``."""
        _check_regions(self, self.key, tokens, token_grid, feature_grid, window)


class RasterCells(NamedTuple):
    """The normalised cells of B images where they lie, their levels joined, for all readers of one arrangement.

    Attributes:
        features: (B, H*W, C).
        saliency: (B, H*W), or None.
        feature_grid: (H, W).
    """

    features: Tensor
    saliency: Tensor | None
    feature_grid: Grid


class PreparedRaster(NamedTuple):
    """Keys and values of B images where they lie, for kernels that find the regions themselves; M = H*W, times the
    levels with fusion "tokens".

    Attributes:
        key: (B, heads, M, d).
        value: (B, heads, M, d), without saliency.
        saliency: (B, M) of any floating dtype, or None.
        feature_grid: (H, W).
    """

    key: Tensor
    value: Tensor
    saliency: Tensor | None
    feature_grid: Grid

    def check(self, tokens: Tensor, feature_grid: Grid) -> None:
        """Raises ValueError unless (B, h*w, D) ``tokens`` can read these."""
        grids = (self.feature_grid, feature_grid)
        check_prepared(tokens, self.key, self.key.shape[0], feature_grid=grids)


def _check_regions(
    prepared: RegionCells | PreparedRegions,
    held: Tensor,
    tokens: Tensor,
    token_grid: Grid,
    feature_grid: Grid,
    window: int,
) -> None:
    grids = {
        "token_grid": (prepared.token_grid, token_grid),
        "feature_grid": (prepared.feature_grid, feature_grid),
    }
    regions = (prepared.token_grid[0] // window) * (prepared.token_grid[1] // window)
    check_prepared(tokens, held, held.shape[0] // regions, **grids)


def _by_regions(x: Tensor) -> Tensor:
    """(B, rows, columns, cells, cells, C) -> (R, n, C)."""
    return x.flatten(3, 4).flatten(0, 2)
