"""Which cells lie under which block of queries, one axis at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_remember.grid import Grid, region


class AxisRegions:
    """The regions of one axis: ``tokens`` queries in blocks of ``window`` over ``cells`` cells.

    Attributes:
        blocks: number of blocks; the last may hold fewer than ``window`` queries.
        extent: cells of the largest region.
        even: all regions have the same extent and none overlap.
    """

    def __init__(self, tokens: int, cells: int, window: int) -> None:
        self.tokens, self.length, self.window = tokens, cells, window
        self.blocks = -(-tokens // window)
        self.even = cells % tokens == 0 and tokens % window == 0
        # Where all are alike, the first tells: a forward pass asks several times.
        blocks = range(1 if self.even else self.blocks)
        bounds = [region(i * window, min((i + 1) * window, tokens), tokens, cells) for i in blocks]
        self.extent = max(stop - start for start, stop in bounds)

    def starts(self, device: torch.device) -> Tensor:
        """(blocks,), the first cell of each region. Computed on the device, so that no copy has to wait for it."""
        return torch.arange(self.blocks, device=device) * (self.window * self.length) // self.tokens

    def cells(self, device: torch.device) -> Tensor:
        """(blocks, extent), the cells of each region; beyond a smaller region's end, some valid cell."""
        cells = self.starts(device)[:, None] + torch.arange(self.extent, device=device)
        return cells.clamp(max=self.length - 1)

    def inside(self, device: torch.device) -> Tensor:
        """(blocks, extent), whether the cell belongs to the region."""
        last_query = (torch.arange(1, self.blocks + 1, device=device) * self.window).clamp(max=self.tokens)
        stops = -(-(last_query * self.length) // self.tokens)
        return self.starts(device)[:, None] + torch.arange(self.extent, device=device) < stops[:, None]

    def interpolation(self, entries: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Weights that read a table of ``entries`` positions per region at the cells of each region.

        A cell's place is measured in the block's exact, possibly fractional span of cells, so that the table means the
        same on every grid. On an even axis with ``extent == entries`` the weights are exactly the identity.

        Returns:
            (1 or blocks, extent, entries), rows sum to 1; a first dimension of 1 where all blocks agree.
        """
        blocks = 1 if self.even else self.blocks
        start = torch.arange(blocks, device=device) * (self.window * self.length)
        cells = start[:, None] // self.tokens + torch.arange(self.extent, device=device)
        # Integers up to the division: the place of a cell's centre, in twice the table's step.
        twice = (2 * cells + 1) * self.tokens - 2 * start[:, None]
        # Half precision is too coarse for a place among many entries.
        wide = torch.promote_types(dtype, torch.float32)
        place = (twice * entries).to(wide) / (2 * self.window * self.length) - 0.5
        place = place.clamp(0, entries - 1)
        weights = (1 - (place[..., None] - torch.arange(entries, device=device, dtype=wide)).abs()).clamp(min=0)
        return weights.to(dtype)


def region_bias(table: Tensor, *, query_grid: Grid, key_grid: Grid, window: int = 1) -> Tensor:
    """A table over positions inside a region, read at the cells of the regions of any pair of grids.

    Args:
        table: (heads, k*k, rows, columns), one entry per query of a block and position inside its region.
        query_grid: (h, w).
        key_grid: (H, W).
        window: k.

    Returns:
        (heads, k*k, cells) on grids that divide evenly, otherwise (heads, blocks, k*k, cells): the two forms of
        ``bias`` that :func:`vision_remember.ops.local_attention` takes. Equal to ``table.flatten(2)`` when the regions
        are as large as the table; bilinear in between.
    """
    heads, queries, table_rows, table_columns = table.shape
    rows, columns = (AxisRegions(*sides, window) for sides in zip(query_grid, key_grid, strict=True))
    if rows.even and columns.even and (rows.extent, columns.extent) == (table_rows, table_columns):
        return table.flatten(2)  # what the weights would make of it
    row_weights = rows.interpolation(table_rows, table.device, table.dtype)
    column_weights = columns.interpolation(table_columns, table.device, table.dtype)
    bias = torch.einsum("hqrc,yar,xbc->hyxqab", table, row_weights, column_weights)
    if rows.even and columns.even:
        return bias.reshape(heads, queries, rows.extent * columns.extent)
    bias = bias.expand(heads, rows.blocks, columns.blocks, queries, rows.extent, columns.extent)
    return bias.reshape(heads, rows.blocks * columns.blocks, queries, rows.extent * columns.extent)
