"""From symbolic pages to pixels."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from vision_remember.synth.labels import LABELS, PHOTO
from vision_remember.synth.page import Draw, Page
from vision_remember.synth.sources import crop, handwriting
from vision_remember.synth.tiles import FACES, tiles

TINTS = ((252, 252, 252), (252, 242, 212), (218, 245, 226), (250, 224, 226))
INKS = ((15, 15, 15), (15, 25, 115), (120, 15, 30))
NOISE = 8.0  # standard deviation, of 255
_BANK = 1 << 20


@cache
def _noise() -> NDArray[np.int16]:
    """A long strip of noise; a page takes a piece of it, which is ten times faster than drawing anew."""
    return np.random.default_rng(0).normal(0, NOISE, _BANK).round().astype(np.int16)


@cache
def _is_hand() -> NDArray[np.bool_]:
    """(labels,), which contents are handwritten."""
    return np.array(["hand" in name for name in LABELS])


@cache
def _plain() -> NDArray[np.bool_]:
    """(labels,), which contents lie on a plate of paper where the page is a photograph."""
    return np.array([name != PHOTO and "frame" not in name for name in LABELS])


def _paste_handwriting(page: Page, canvas: NDArray[np.int16], ink: tuple[int, int, int], draw: Draw) -> None:
    """Writes each handwritten digit of the page with another hand."""
    unit, cell = page.unit, page.cell
    for row, column in np.argwhere(_is_hand()[page.labels[::unit, ::unit]]).tolist():
        halves = LABELS[page.labels[row * unit, column * unit]].split("+")
        side = unit * cell
        height, width = side - 1, side // len(halves) - 1  # a pixel between one digit and the next
        for place, half in enumerate(halves):
            if half:
                samples = handwriting(page.split, int(half[-1]), height, width)
                coverage = samples[draw.below(len(samples)), ..., None]
                top, left = row * side, column * side + place * (width + 1)
                under = canvas[top : top + height, left : left + width]
                under += ((np.array(ink, np.int32) - under) * coverage // 255).astype(np.int16)


def render(page: Page, draw: Draw) -> NDArray[np.uint8]:
    """Renders a page; typeface, ink, paper, hands and noise are drawn and do not bear on any answer.

    Returns:
        (grid * cell, grid * cell, 3).
    """
    grid, cell = page.grid, page.cell
    size = grid * cell
    # small characters keep to one typeface: at seven pixels, another one is only noise
    face = draw.pick(FACES) if page.level == "coarse" else FACES[0]
    ink, tint = draw.pick(INKS), np.array(draw.pick(TINTS), np.uint16)
    atlas = tiles(cell, page.level, face, ink)

    quarter = np.arange(grid) % 2
    which = (page.labels, quarter[:, None], quarter[None, :])
    colour = atlas.colour[which].transpose(0, 2, 1, 3, 4).reshape(size, size, 3)
    free = atlas.free[which].transpose(0, 2, 1, 3, 4).reshape(size, size, 1)
    if page.photo is None:
        paper: NDArray[np.uint16] = tint
    else:
        paper = crop(*page.photo, size).astype(np.uint16)
        paper[_plain()[page.labels].repeat(cell, 0).repeat(cell, 1)] = tint
    mixed = colour + paper * free  # at most 255 * 255, so that 16 bits hold it
    canvas = (mixed // 255).astype(np.int16)
    _paste_handwriting(page, canvas, ink, draw)

    start = draw.below(max(1, _BANK - canvas.size))
    canvas += np.resize(_noise()[start : start + canvas.size], canvas.shape)  # a page past the strip has it again
    return canvas.clip(0, 255).astype(np.uint8)
