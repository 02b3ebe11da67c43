"""Pictures against labels: a cell shows what its label says, with the photographs and the handwriting of its split."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from vision_remember.synth import LABELS, LEVELS, SPLITS, TASKS, make_scene
from vision_remember.synth.labels import PHOTO
from vision_remember.synth.page import Page
from vision_remember.synth.render import INKS, NOISE, TINTS
from vision_remember.synth.scene import draw_page
from vision_remember.synth.sources import PHOTOS, crop, handwriting
from vision_remember.synth.tiles import FACES, tiles

CELL, GRID = 8, 12
HANDS = np.array(["hand" in name for name in LABELS])
ON_PHOTOS = np.array([name == PHOTO or "frame" in name for name in LABELS])
MOST = 1.6 * NOISE**2  # six standard deviations of the mean square of a cell's noise


class Look(NamedTuple):
    """What varies from page to page and bears on no answer."""

    face: str
    ink: tuple[int, int, int]
    tint: tuple[int, int, int]


LOOKS = [Look(*parts) for parts in product(FACES, INKS, TINTS)]


def cells_of(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(size, size, 3) -> (GRID, GRID, CELL, CELL, 3)."""
    return picture.reshape(GRID, CELL, GRID, CELL, 3).transpose(0, 2, 1, 3, 4).astype(np.float32)


def off(picture: NDArray[np.uint8], page: Page, look: Look) -> NDArray[np.float32]:
    """(GRID, GRID), the mean square by which each cell differs from its label's tile in a look."""
    atlas, made = tiles(CELL, page.level, look.face, look.ink), np.empty((GRID, GRID, CELL, CELL, 3), np.float32)
    behind = None if page.photo is None else cells_of(crop(*page.photo, GRID * CELL))
    for row, column in product(range(GRID), repeat=2):
        label = page.labels[row, column]
        under = look.tint if behind is None or not ON_PHOTOS[label] else behind[row, column]
        tile = label, row % 2, column % 2
        made[row, column] = (atlas.colour[tile] + np.array(under, np.float32) * atlas.free[tile]) / 255
    return np.square(made - cells_of(picture)).mean((2, 3, 4))


def closest(picture: NDArray[np.uint8], page: Page) -> tuple[Look, NDArray[np.float32]]:
    """The look that fits the cells without handwriting best, and by how much each of these is off."""
    printed = ~HANDS[page.labels]
    found = {
        look: off(picture, page, look)[printed]
        for look in (LOOKS if page.level == "coarse" else LOOKS[: len(INKS) * len(TINTS)])
    }
    look = min(found, key=lambda look: float(found[look].sum()))
    return look, found[look]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", TASKS)
def test_a_cell_shows_what_its_label_says(task: str, level: str) -> None:
    page, _ = draw_page(task, 0, split="test", level=level)
    _, left = closest(make_scene(task, 0, split="test", level=level).image, page)
    assert left.max() < MOST
    assert left.mean() > NOISE**2 / 4  # noise; much of it is cut off near white


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", ["coarse", "medium"])
@pytest.mark.parametrize("task", ["digits", "handwriting"])
def test_a_handwritten_digit_is_a_sample_of_the_pages_split(task: str, level: str, split: str) -> None:
    page, _ = draw_page(task, 1, split=split, level=level)
    picture = make_scene(task, 1, split=split, level=level).image
    look, _ = closest(picture, page)
    unit = page.unit
    side = unit * CELL
    found = 0
    for row, column in np.argwhere(HANDS[page.labels[::unit, ::unit]]).tolist():
        digit = int(LABELS[page.labels[row * unit, column * unit]][-1])
        seen = picture[row * side :, column * side :][: side - 1, : side - 1].astype(np.float32)
        best = {}
        for name in SPLITS:
            cover = handwriting(name, digit, side - 1, side - 1)[..., None] / np.float32(255)
            drawn = np.array(look.tint) * (1 - cover) + np.array(look.ink) * cover
            best[name] = float(np.square(drawn - seen).mean((1, 2, 3)).min())
        assert best[split] < MOST
        assert best[split] == min(best.values())
        found += 1
    assert found > 10


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", ["sign", "marked_patch"])
def test_a_page_takes_the_photographs_of_its_split(task: str, split: str) -> None:
    pages = [draw_page(task, index, split=split)[0] for index in range(40)]
    assert {page.photo[0] for page in pages if page.photo} == set(PHOTOS[split])


def test_typeface_ink_and_paper_vary() -> None:
    looks = set()
    for index in range(40):
        page, _ = draw_page("characters", index, level="coarse")
        looks.add(closest(make_scene("characters", index, level="coarse").image, page)[0])
    assert [set(parts) for parts in zip(*looks, strict=True)] == [set(FACES), set(INKS), set(TINTS)]
