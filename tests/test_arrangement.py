"""Cells of several images in one hidden state: transformers' own helpers tell where each patch is."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from vision_remember.arrangement import arrange, block_order
from vision_remember.encoder import EncoderSpec
from vision_remember.grid import token_grid_over

GRIDS = torch.tensor([[1, 12, 20], [2, 4, 6], [1, 12, 20]])


def spec(order: str, **names: Any) -> EncoderSpec:
    return EncoderSpec(name="mine", classes=(), layers="blocks", order=order, **names)  # type: ignore[arg-type]


def encoder(**numbers: Any) -> nn.Module:
    module = nn.Module()
    for name, number in numbers.items():
        setattr(module, name, number)
    return module


def coordinates(merge: int) -> Tensor:
    """(N, 3), image, row and column of each patch as Qwen2-VL orders them."""
    image = torch.arange(len(GRIDS)).repeat_interleave(GRIDS.prod(1))[:, None]
    return torch.cat([image, get_vision_position_ids(GRIDS, merge)], dim=1)


def check_rasters(parts: list[Tensor], groups: Any) -> None:
    """Each tile's coordinates run row by row; tiles with one size are together, a video's frames are tiles."""
    assert [(group.numbers, group.grid) for group in groups] == [((0, 3), (12, 20)), ((1, 2), (4, 6))]
    images = {0: 0, 1: 1, 2: 1, 3: 2}
    for part, group in zip(parts, groups, strict=True):
        for tile, number in zip(part, group.numbers, strict=True):
            height, width = group.grid
            expected = [[images[number], row, column] for row in range(height) for column in range(width)]
            assert tile.tolist() == expected


@pytest.mark.parametrize("merge", [1, 2])
def test_blocks_come_out_in_raster_order(merge: int) -> None:
    hidden = coordinates(merge)
    found = arrange(encoder(merge=merge), spec("blocks", sizes="grids", merge="merge"), hidden, {"grids": GRIDS}, None)
    check_rasters(found.split(hidden), found.groups)


@pytest.mark.parametrize("window", [16, 24])
def test_windows_come_out_in_raster_order(window: int) -> None:
    index, _ = get_vision_window_index(GRIDS, spatial_merge_size=2, window_size=window, patch_size=4)
    hidden = coordinates(2).unflatten(0, (-1, 4))[index].flatten(0, 1)
    names = {"sizes": "grids", "merge": 2, "window_size": "window", "patch_size": "patch"}
    found = arrange(encoder(window=window, patch=4), spec("windows", **names), hidden, {"grids": GRIDS}, None)
    check_rasters(found.split(hidden), found.groups)


@pytest.mark.parametrize("leading", [True, False], ids=["one sequence", "flat"])
def test_packed_rasters_are_cut_apart(leading: bool) -> None:
    hidden = coordinates(1)[None] if leading else coordinates(1)
    pixels = [(h * 14, w * 14) for t, h, w in GRIDS.tolist() for _ in range(t)]
    names = {"sizes": "sizes", "size_unit": "patch_size"}
    found = arrange(encoder(patch_size=14), spec("packed", **names), hidden, {"sizes": pixels}, None)
    check_rasters(found.split(hidden), found.groups)


def test_padded_rows_lose_their_padding() -> None:
    shapes = torch.tensor([[2, 3], [1, 4], [2, 3]])
    hidden = torch.arange(3 * 8).view(3, 8, 1)
    found = arrange(encoder(), spec("padded", sizes="shapes"), hidden, {"shapes": shapes}, None)
    assert [part.flatten(1).tolist() for part in found.split(hidden)] == [
        [[0, 1, 2, 3, 4, 5], [16, 17, 18, 19, 20, 21]],
        [[8, 9, 10, 11]],
    ]


@pytest.mark.parametrize("cls", [None, 0, -1])
def test_a_raster_loses_its_class_token_wherever_it_stands(cls: int | None) -> None:
    count = 16 + (cls is not None)
    hidden = torch.arange(count).view(1, count, 1)
    found = arrange(encoder(), spec("raster", cls_token=cls, prefix_tokens=int(cls == 0)), hidden, {}, None)
    assert found.groups[0].grid == (4, 4)
    assert found.split(hidden)[0].flatten().tolist() == list(range(int(cls == 0), int(cls == 0) + 16))


def test_a_map_is_a_raster() -> None:
    hidden = torch.arange(2 * 3 * 5).view(2, 3, 5, 1)
    found = arrange(encoder(), spec("raster"), hidden, {}, None)
    assert found.groups[0].grid == (3, 5)
    assert found.split(hidden)[0].flatten().tolist() == list(range(30))


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        (spec("packed", sizes="sizes"), {}, "ran without sizes"),
        (spec("packed", sizes="sizes"), {"sizes": torch.tensor([[2, 3]])}, r"made 7 cells, but sizes says 6 \(2x3\)"),
        (spec("blocks", sizes="sizes", merge=2), {"sizes": torch.tensor([[1, 7]])}, "1x7 cells.*blocks of 2x2"),
        (spec("blocks", sizes="sizes", merge="name"), {"sizes": torch.tensor([[1, 7]])}, "name is 'x'"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(given: EncoderSpec, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arrange(encoder(name="x"), given, torch.zeros(7, 1), arguments, None)


@pytest.mark.parametrize("wrong", [{"order": "spiral"}, {"order": "packed"}])
def test_an_impossible_spec_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="order="):
        spec(**wrong)


def test_block_order_is_a_permutation() -> None:
    for grid, merge, window in itertools.product([(4, 6), (6, 10)], [1, 2], [0, 2, 3]):
        assert block_order(grid, merge, window).sort().values.tolist() == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize(
    ("grid", "tokens", "expected"),
    [
        ((24, 24), 576, (24, 24)),
        ((24, 24), 144, (12, 12)),
        ((12, 20), 60, (6, 10)),
        ((27, 27), 196, (14, 14)),
        ((12, 20), 16, None),
        ((24, 24), 65, None),
        ((4, 4), 0, None),
        ((4, 4), 64, None),
    ],
)
def test_the_grid_of_tokens_over_cells(grid: Any, tokens: int, expected: Any) -> None:
    assert token_grid_over(grid, tokens) == expected


def test_numbers_may_be_pairs_of_equals() -> None:
    hidden = coordinates(2)
    model = encoder(config=SimpleNamespace(merge=[2, 2]))
    found = arrange(model, spec("blocks", sizes="g", merge="config.merge"), hidden, {"g": GRIDS}, None)
    check_rasters(found.split(hidden), found.groups)
