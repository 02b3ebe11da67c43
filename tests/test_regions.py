"""Which cells lie under which block, against PyTorch's pooling; the position bias, against its grid sampling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.reference import block_numbers, frame, visible_cells
from vision_remember.grid import Grid, check_grid, check_length, region, square_grid
from vision_remember.ops import region_bias
from vision_remember.ops.regions import AxisRegions

CPU = torch.device("cpu")
SIDE = st.integers(1, 30)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tokens=SIDE, cells=SIDE, window=st.integers(1, 5))
def test_an_axis_has_the_regions_of_adaptive_pooling(tokens: int, cells: int, window: int) -> None:
    axis = AxisRegions(tokens, cells, window)
    visible = visible_cells((1, tokens), (1, cells), window)
    by_block = [visible[first].nonzero().flatten().tolist() for first in range(0, tokens, window)]
    assert axis.blocks == len(by_block)
    assert axis.extent == max(map(len, by_block))
    assert axis.starts(CPU).tolist() == [region[0] for region in by_block]
    framed = zip(axis.cells(CPU), axis.inside(CPU), strict=True)
    assert [row[inside].tolist() for row, inside in framed] == by_block
    assert axis.cells(CPU).min() >= 0
    assert axis.cells(CPU).max() < cells


@pytest.mark.parametrize(
    ("tokens", "cells", "window", "even"),
    [(12, 24, 1, True), (12, 24, 3, True), (12, 24, 5, False), (13, 27, 1, False), (5, 4, 1, False), (4, 4, 2, True)],
)
def test_an_axis_is_even_when_all_its_regions_are_alike(tokens: int, cells: int, window: int, even: bool) -> None:
    assert AxisRegions(tokens, cells, window).even == even


@settings(max_examples=50, deadline=None, derandomize=True)
@given(tokens=SIDE, cells=SIDE)
def test_regions_of_tokens_cover_every_cell_and_none_is_empty(tokens: int, cells: int) -> None:
    bounds = [region(i, i + 1, tokens, cells) for i in range(tokens)]
    assert all(start < stop for start, stop in bounds)
    assert {cell for start, stop in bounds for cell in range(start, stop)} == set(range(cells))


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("query_grid", [(4, 6), (12, 12), (2, 8)])
def test_a_table_as_large_as_the_region_is_taken_as_it_is(query_grid: Grid, window: int) -> None:
    table = torch.randn(3, window**2, 2 * window, 3 * window, generator=torch.Generator().manual_seed(0))
    key_grid = (2 * query_grid[0], 3 * query_grid[1])
    assert torch.equal(region_bias(table, query_grid=query_grid, key_grid=key_grid, window=window), table.flatten(2))


def sampled(table: Tensor, query_grid: Grid, key_grid: Grid, window: int) -> Tensor:
    """(heads, blocks, k*k, cells of the frame), NaN beyond a region: the table stretched over each block's exact span.

    ``grid_sample`` counts places from -1 to 1, from one edge of the table to the other.
    """
    heads, queries = table.shape[:2]
    rows, columns = frame(query_grid, key_grid, window)
    regions = visible_cells(query_grid, key_grid, window).unflatten(1, key_grid)
    blocks = block_numbers(query_grid, window)
    bias = table.new_full((heads, int(blocks.max()) + 1, queries, rows * columns), math.nan)
    for block in range(bias.shape[1]):
        first = int((blocks == block).nonzero()[0])
        cells = regions[first].nonzero()
        corner = torch.tensor(divmod(first, query_grid[1])).double()
        span = torch.tensor(key_grid).double() / torch.tensor(query_grid)  # cells under one query
        places = 2 * (cells + 0.5 - corner * span) / (window * span) - 1
        read = F.grid_sample(
            table, places.flip(-1).expand(heads, 1, -1, -1), padding_mode="border", align_corners=False
        )
        y, x = (cells - cells[0]).unbind(-1)
        bias[:, block, :, y * columns + x] = read[:, :, 0]
    return bias


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize(
    ("query_grid", "key_grid"),
    [
        ((4, 4), (9, 9)),
        ((4, 4), (8, 9)),
        ((5, 3), (7, 11)),
        ((4, 6), (12, 6)),
        ((6, 3), (18, 12)),
        ((5, 5), (3, 4)),
        ((1, 4), (2, 9)),
    ],
)
def test_other_regions_read_the_table_bilinearly(query_grid: Grid, key_grid: Grid, window: int) -> None:
    table = torch.randn(2, window**2, 2 * window, 3 * window, generator=torch.Generator().manual_seed(0)).double()
    expected = sampled(table, query_grid, key_grid, window)
    bias = region_bias(table, query_grid=query_grid, key_grid=key_grid, window=window)
    if bias.ndim == 3:
        bias = bias.unsqueeze(1).expand(expected.shape)
    assert bias.shape == expected.shape
    inside = expected.isfinite()
    torch.testing.assert_close(bias[inside], expected[inside], rtol=0, atol=1e-12)
    assert bias.isfinite().all()


def test_every_entry_of_a_table_gets_a_gradient_on_uneven_grids() -> None:
    table = torch.zeros(2, 4, 4, 4, requires_grad=True)
    region_bias(table, query_grid=(14, 14), key_grid=(27, 27), window=2).sum().backward()
    assert (table.grad > 0).all()


@pytest.mark.parametrize(("length", "grid"), [(1, (1, 1)), (576, (24, 24)), (729, (27, 27))])
def test_square_grid(length: int, grid: Grid) -> None:
    assert square_grid(length) == grid


def test_a_length_that_is_no_square_asks_for_the_grid() -> None:
    with pytest.raises(ValueError, match=r"577 cells .* pass the grid"):
        square_grid(577)


@pytest.mark.parametrize("grid", [(0, 2), (2, -1), (2,), (2, 2, 2), (2.0, 2), ("2", 2)])
def test_a_grid_is_two_positive_whole_numbers(grid: Any) -> None:
    with pytest.raises(ValueError, match="the_grid="):
        check_grid("the_grid", grid)


def test_check_length_names_both_numbers() -> None:
    check_length("tokens", 12, "token_grid", (3, 4))
    with pytest.raises(ValueError, match="tokens holds 10 positions, but token_grid=3x4 has 12"):
        check_length("tokens", 10, "token_grid", (3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_the_table_as_precisely_as_it_holds_it(dtype: torch.dtype) -> None:
    """Places are counted among all entries of a block, twelve a side here."""
    table = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    grids: dict[str, Any] = {"query_grid": (20, 21), "key_grid": (64, 65), "window": 4}
    exact = region_bias(table.double(), **grids)
    found = region_bias(table, **grids)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps * table.abs().max().item()
    )
