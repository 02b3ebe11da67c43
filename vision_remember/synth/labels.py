"""The closed vocabulary of what a cell of a page can hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLANK, PHOTO = "blank", "photo"
LETTERS = tuple("abcdefghjklmnprstuxz")  # no i, o, q, v, w, y: too like others at four pixels
DIGITS = tuple("0123456789")
HAND = tuple(f"hand {digit}" for digit in DIGITS)
COLOURS = ("red", "green", "blue", "orange", "purple", "teal")
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
DIRECTIONS = ("left", "right", "above", "below")
TURNS = ("clockwise", "counterclockwise")
EIGHTHS = (2, 4, 6, 8)  # how much of a cell a bar fills, from below
FRAMES = ("pink", "cyan", "lime", "yellow")
PHOTO_COLOURS = ("black", "white", "grey", "brown", "green", "blue")

_WHOLE = (
    BLANK,
    PHOTO,
    *LETTERS,
    *DIGITS,
    *HAND,
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *(f"arrow {direction}" for direction in DIRECTIONS),
    *(f"bar {eighths}" for eighths in EIGHTHS),
    *(f"{colour} bar {eighths}" for colour in COLOURS for eighths in EIGHTHS),
    *(f"{colour} gear" for colour in COLOURS),
    *(f"{colour} gear {turn}" for colour in COLOURS for turn in TURNS),
    *(f"{colour} box" for colour in COLOURS),
    *(f"{colour} half box" for colour in COLOURS),
    *(f"{frame} frame on {colour}" for frame in FRAMES for colour in PHOTO_COLOURS),
)


def _pairs(characters: tuple[str, ...]) -> tuple[str, ...]:
    """Two half-wide characters in one cell, written ``left+right``; either side may be empty."""
    halves = ("", *characters)
    return tuple(f"{left}+{right}" for left in halves for right in halves if left or right)


LABELS: tuple[str, ...] = (*_WHOLE, *_pairs((*LETTERS, *DIGITS)), *_pairs(HAND))
"""Every content of a cell. The first are contents of a whole cell; ``a+7`` is two half-wide characters side by side."""

INDEX: dict[str, int] = {name: index for index, name in enumerate(LABELS)}

PARTS: tuple[str, ...] = _WHOLE
"""What the two halves of a cell can hold: the labels that are no pairs."""


def _parts() -> NDArray[np.int16]:
    rows = []
    for name in LABELS:
        halves = name.split("+") if "+" in name else [name, name]
        rows.append([INDEX[half or BLANK] for half in halves])
    return np.array(rows, np.int16)


LABEL_PARTS: NDArray[np.int16] = _parts()
"""(labels, 2), the left and right half of each label as indices into ``PARTS``."""
