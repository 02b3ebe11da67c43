"""One small picture per label: what is drawn once, and then only looked up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vision_remember.synth.labels import BLANK, COLOURS, DIGITS, DIRECTIONS, LABELS, LETTERS, PARTS, PHOTO
from vision_remember.synth.sources import font, needed

FACES = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol")
RGB = {
    "red": (205, 45, 45),
    "green": (40, 150, 65),
    "blue": (45, 85, 205),
    "orange": (240, 150, 30),
    "purple": (135, 55, 165),
    "teal": (25, 165, 170),
    "pink": (255, 30, 160),
    "cyan": (0, 235, 255),
    "lime": (130, 255, 0),
    "yellow": (255, 235, 0),
}
RGB_COLOURS = tuple(RGB[colour] for colour in COLOURS)
GREY = (85, 105, 125)
DARK = (35, 35, 45)
OVERSAMPLING = 8


@dataclass(frozen=True)
class Tiles:
    """The pictures of all labels, each in four quarters for contents that span 2 x 2 cells.

    Attributes:
        colour: (labels, 2, 2, cell, cell, 3), colour times coverage, 0..65025.
        free: (labels, 2, 2, cell, cell, 1), 255 minus coverage.
    """

    colour: NDArray[np.uint16]
    free: NDArray[np.uint16]


def _glyph(character: str, face: str, height: int, width: int) -> NDArray[np.uint8]:
    """Coverage of a character that fills (height, width)."""
    with needed():
        from PIL import Image, ImageDraw
    letter = font(face, 64)
    left, top, right, bottom = letter.getbbox(character.upper())
    large = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(large).text((-left, -top), character.upper(), fill=255, font=letter)
    return np.asarray(large.resize((width, height), Image.Resampling.BOX), np.uint8)


def _outline(name: str, draw: Any, colour: tuple[int, int, int], s: float) -> None:
    """Draws a shape, arrow or gear into a square of side ``s``."""

    def polygon(*points: tuple[float, float], fill: tuple[int, int, int] = colour) -> None:
        draw.polygon([(x * s, y * s) for x, y in points], fill=fill)

    def ellipse(left: float, top: float, right: float, bottom: float, fill: tuple[int, int, int] = colour) -> None:
        draw.ellipse((left * s, top * s, right * s, bottom * s), fill=fill)

    if name == "circle":
        ellipse(0, 0, 1, 1)
    elif name == "square":
        polygon((0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92))
    elif name == "triangle":
        polygon((0.5, 0), (1, 1), (0, 1))
    elif name == "cross":
        polygon((0.33, 0), (0.67, 0), (0.67, 1), (0.33, 1))
        polygon((0, 0.33), (1, 0.33), (1, 0.67), (0, 0.67))
    elif name == "diamond":
        polygon((0.5, 0), (0.85, 0.5), (0.5, 1), (0.15, 0.5))
    elif name in DIRECTIONS:
        points = [(0, 0.36), (0.5, 0.36), (0.5, 0.05), (1, 0.5), (0.5, 0.95), (0.5, 0.64), (0, 0.64)]
        turn = {
            "right": lambda x, y: (x, y),
            "left": lambda x, y: (1 - x, y),
            "below": lambda x, y: (y, x),
            "above": lambda x, y: (y, 1 - x),
        }[name]
        polygon(*(turn(x, y) for x, y in points))
    else:  # a gear: a toothed wheel; with a turn, a light spot to the right (clockwise) or left of its upper half
        for step in range(8):
            angle = math.pi * step / 4
            x, y = 0.5 + 0.4 * math.cos(angle), 0.5 + 0.4 * math.sin(angle)
            ellipse(x - 0.1, y - 0.1, x + 0.1, y + 0.1)
        ellipse(0.13, 0.13, 0.87, 0.87)
        if name == "gear":
            ellipse(0.4, 0.4, 0.6, 0.6, fill=(250, 250, 250))
        else:
            mirror = (lambda x: x) if name == "clockwise" else (lambda x: 1 - x)
            points = [(0.3, 0.15), (0.85, 0.5), (0.3, 0.85)]
            polygon(*((mirror(x), y) for x, y in points), fill=(250, 250, 250))


def _drawn(name: str, colour: tuple[int, int, int], side: int) -> NDArray[np.uint8]:
    """(side, side, 4) of an outlined figure."""
    with needed():
        from PIL import Image, ImageDraw
    large = Image.new("RGBA", (side * OVERSAMPLING,) * 2, (*colour, 0))
    _outline(name, ImageDraw.Draw(large), colour, side * OVERSAMPLING - 1)
    return np.asarray(large.resize((side, side), Image.Resampling.BOX), np.uint8)


def _cellwise(name: str, cell: int) -> NDArray[np.uint8] | None:
    """(cell, cell, 4) of a content that looks the same at every level, or None."""
    words = name.split()
    tile = np.zeros((cell, cell, 4), np.uint8)
    if words[-2:-1] == ["bar"]:
        tile[cell - int(words[-1]) * cell // 8 :] = (*(GREY if len(words) == 2 else RGB[words[0]]), 255)
    elif words[-1] == "box":
        tile[cell // 2 if "half" in words else 0 :] = (*RGB[words[0]], 255)
    elif name not in (BLANK, PHOTO):
        return None
    return tile


def item_side(cell: int, level: str) -> int:
    """Pixels along the side of an item."""
    return {"coarse": 2 * cell - 1, "medium": cell - 1, "fine": cell // 2 + 1}[level]


def _whole(name: str, cell: int, level: str, face: str) -> NDArray[np.uint8]:
    """(side, side, 4) of a content in its slot; ink is black here."""
    side, item = 2 * cell if level == "coarse" else cell, item_side(cell, level)
    tile = np.zeros((side, side, 4), np.uint8)
    words = name.split()
    if words[0] == "hand":
        return tile  # each is another sample, pasted by the renderer
    if "frame" in words:
        start, thick = (side - item) // 2, max(1, item // 8)
        end = start + item + (level != "fine")
        start, inner = start, np.s_[start + thick : end - thick]
        tile[start:end, start:end] = (*RGB[words[0]], 255)
        tile[inner, inner] = 0
        return tile
    start = (side - item) // 2
    box = np.s_[start : start + item]
    if name in (*LETTERS, *DIGITS):
        tile[box, box, 3] = _glyph(name, face, item, item)
    elif words[0] == "arrow":
        tile[box, box] = _drawn(words[1], DARK, item)
    else:
        tile[box, box] = _drawn(words[-1], RGB[words[0]], item)
    return tile


@cache
def _pictures(cell: int, level: str, face: str) -> NDArray[np.uint8]:
    """(labels, 2, 2, cell, cell, 4), colour and coverage, with black ink."""
    pictures = np.zeros((len(LABELS), 2, 2, cell, cell, 4), np.uint8)
    for index, name in enumerate(PARTS):
        picture = _cellwise(name, cell)
        if picture is not None:
            pictures[index] = picture
            if "bar" in name.split():  # a pixel between one bar and the next
                pictures[index, :, int(level == "coarse") :, :, -1] = 0
            continue
        picture = _whole(name, cell, level, face)
        if level == "coarse":
            picture = picture.reshape(2, cell, 2, cell, 4).transpose(0, 2, 1, 3, 4)
        pictures[index] = picture
    width = cell // 2
    halves = {name: _glyph(name, face, cell - 1, width - 1) for name in (*LETTERS, *DIGITS)}
    for index, name in enumerate(LABELS):
        if "+" in name:
            for place, half in enumerate(name.split("+")):
                if half in halves:
                    pictures[index, :, :, : cell - 1, place * width : (place + 1) * width - 1, 3] = halves[half]
    return pictures


@cache
def inked() -> NDArray[np.bool_]:
    """(labels,), which contents are written with the page's ink."""
    return np.array(["+" in name or name in (*LETTERS, *DIGITS) for name in LABELS])


@lru_cache(maxsize=24)
def tiles(cell: int, level: str, face: str, ink: tuple[int, int, int]) -> Tiles:
    """The pictures of all labels with characters in one typeface and ink."""
    pictures = _pictures(cell, level, face)
    coverage = pictures[..., 3:].astype(np.uint16)
    colour = pictures[..., :3].astype(np.uint16) * coverage
    colour[inked()] = coverage[inked()] * np.array(ink, np.uint16)
    return Tiles(colour, 255 - coverage)
