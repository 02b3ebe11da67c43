"""Coloured figures on a page: what General and Vision-Centric share."""

from __future__ import annotations

from vision_remember.synth.labels import COLOURS, SHAPES
from vision_remember.synth.page import Draw, Page, Sheet

FIGURES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
PHRASES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def find(sheet: Sheet, figure: str) -> tuple[int, int] | None:
    """Where a figure stands; None if it is not there once."""
    places = [(row, column) for row, column, name in sheet.filled() if name == figure]
    return places[0] if len(places) == 1 else None


def draw_pairs(page: Page, draw: Draw, count: int = 5) -> list[tuple[str, str, str]]:
    """Pairs of neighbours, each in a square of 2 x 2 slots of its own.

    Returns:
        One figure, another and the side of the other on which the one stands.
    """
    squares = draw.sample(range((page.slots // 2) ** 2), count)
    figures = draw.sample(FIGURES, 2 * count)
    pairs = []
    for number, square in enumerate(squares):
        row, column = (2 * place for place in divmod(square, page.slots // 2))
        one, other, side = figures[2 * number], figures[2 * number + 1], draw.pick(tuple(STEPS))
        down, across = STEPS[side]
        row += draw.below(2) if down == 0 else int(down < 0)
        column += draw.below(2) if across == 0 else int(across < 0)
        page.put(row, column, other)
        page.put(row + down, column + across, one)
        pairs.append((one, other, side))
    return pairs


def side_of(sheet: Sheet, one: str, other: str) -> str | None:
    """On which side of its neighbour ``other`` the figure ``one`` stands."""
    first, second = find(sheet, one), find(sheet, other)
    if first is None or second is None:
        return None
    step = (first[0] - second[0], first[1] - second[1])
    return next((side for side, known in STEPS.items() if known == step), None)
