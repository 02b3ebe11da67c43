"""Vision-Centric: patches of photographs, counting, relations and depth."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vision_remember.synth.base import Aspect, Board, Question, Task, options, say
from vision_remember.synth.boards import board_task, first_word
from vision_remember.synth.figures import FIGURES, STEPS, draw_pairs, side_of
from vision_remember.synth.labels import COLOURS, FRAMES, PHOTO, PHOTO_COLOURS, SHAPES
from vision_remember.synth.page import Draw, Page, Sheet
from vision_remember.synth.sources import PHOTOS, crop, places

GROUP = "Vision-Centric"
UNCLEAR = -1
MOST_COUNT = 6


def photo_colours(pixels: NDArray[np.uint8], side: int) -> NDArray[np.int64]:
    """Which of ``PHOTO_COLOURS`` the middle of each patch has, or ``UNCLEAR`` where one could argue.

    Args:
        pixels: (n * side, n * side, 3).

    Returns:
        (n, n).
    """
    n, margin = len(pixels) // side, side // 4
    patches = pixels.reshape(n, side, n, side, 3)[:, margin : side - margin, :, margin : side - margin]
    red, green, blue = np.moveaxis(patches.mean((1, 3)), -1, 0)
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    plain = high - low < 0.12 * high
    rules = {
        "black": high < 40,
        "white": plain & (low > 200),
        "grey": plain & (low > 80) & (high < 170),
        "brown": (high > 70) & (red > 1.25 * green) & (green > 1.05 * blue),
        "green": (high > 60) & (green > 1.15 * red) & (green > 1.15 * blue),
        "blue": (high > 70) & (blue > 1.25 * red) & (blue > 1.1 * green),
    }
    colours = np.full((n, n), UNCLEAR)
    for index, name in enumerate(PHOTO_COLOURS):
        colours[rules[name]] = index
    colours[patches.std((1, 3)).max(-1) > 25] = UNCLEAR
    return colours


def draw_marked_patch(page: Page, draw: Draw) -> list[Question]:
    """Four frames on a photograph, each around a patch of one colour."""
    size = page.grid * page.cell
    name = draw.pick(PHOTOS[page.split])
    down, across = places(name, size)
    page.photo = (name, draw.below(down), draw.below(across))
    page.put_cells(0, 0, page.grid, page.grid, PHOTO)
    colours = photo_colours(crop(*page.photo, size), page.unit * page.cell)
    found = [(int(index), np.argwhere(colours == index).tolist()) for index in np.unique(colours) if index != UNCLEAR]
    taken, asked = set(), []
    for frame in FRAMES:
        if not found:
            break
        index, patches = draw.pick(found)  # by colour first, or nearly all would be that of the sky
        row, column = draw.pick(patches)
        if (row, column) in taken:
            continue
        taken.add((row, column))
        colour = PHOTO_COLOURS[index]
        page.put(row, column, f"{frame} frame on {colour}")
        others = [other for other in PHOTO_COLOURS if other != colour]
        text = f"what colour is in the {frame} frame"
        asked.append(Question(text, colour, options(draw, colour, others), category="colour"))
    return asked


def solve_marked_patch(sheet: Sheet, question: Question) -> str | None:
    frame = question.text.split()[5]
    found = [name.split()[-1] for _, _, name in sheet.filled() if name.startswith(f"{frame} frame")]
    return found[0] if len(found) == 1 else None


def draw_count(page: Page, draw: Draw) -> list[Question]:
    """Several figures of a few kinds."""
    kinds = {figure: draw.between(1, MOST_COUNT) for figure in draw.sample(FIGURES, 3)}
    drawn = [figure for figure, count in kinds.items() for _ in range(count)]
    for place, figure in zip(draw.sample(range(page.slots**2), len(drawn)), drawn, strict=True):
        page.put(*divmod(place, page.slots), figure)
    asked = []
    for figure, count in kinds.items():
        others = [str(other) for other in range(1, MOST_COUNT + 1) if other != count]
        text = f"how many figures are {figure}"
        asked.append(Question(text, str(count), options(draw, str(count), others), category="Count"))
    return asked


def solve_count(sheet: Sheet, question: Question) -> str | None:
    return str(sum(name == " ".join(question.text.split()[-2:]) for _, _, name in sheet.filled()))


def draw_relation(page: Page, draw: Draw) -> list[Question]:
    """On which side of its neighbour a figure stands."""
    return [
        Question(f"where is the {one} from the {other}", side, tuple(draw.shuffled(tuple(STEPS))), category="Relation")
        for one, other, side in draw_pairs(page, draw)
    ]


def solve_relation(sheet: Sheet, question: Question) -> str | None:
    words = question.text.split()
    return side_of(sheet, " ".join(words[3:5]), " ".join(words[-2:]))


def draw_depth(page: Page, draw: Draw) -> list[Question]:
    """Boxes of one real size on a plane: the closer, the larger and the lower.

    Sides differ by two cells, one cell or half a cell, after the level.
    """
    step, count = {"coarse": 4, "medium": 2, "fine": 1}[page.level], 2 if page.level == "coarse" else 3
    sides = draw.sample([side for side in range(2, 9) if side % step == 0], count)  # in half cells
    colours = draw.sample(COLOURS, count)
    room = page.grid // count
    for number, (colour, side) in enumerate(zip(colours, sides, strict=True)):
        width = (side + 1) // 2
        column = number * room + draw.below(room - width + 1)
        column -= column % page.unit
        bottom = page.grid // 2 + side * page.grid // 24 + 1
        bottom -= bottom % page.unit
        page.put_cells(bottom - side // 2, column, side // 2, width, f"{colour} box")
        if side % 2:
            page.put_cells(bottom - side // 2 - 1, column, 1, width, f"{colour} half box")
    boxes = dict(zip(colours, sides, strict=True))
    asked = []
    for one, other in [draw.sample(colours, 2) for _ in range(count - 1)]:
        for word in ("closer", "farther"):
            answer = one if (boxes[one] > boxes[other]) == (word == "closer") else other
            text = f"which box is {word} {one} or {other}"
            asked.append(Question(text, answer, (one, other), category="Depth"))
    return asked


def solve_depth(sheet: Sheet, question: Question) -> str | None:
    """The closer box covers more of the page."""
    words = question.text.split()
    one, other = (
        sum(2 * (name == f"{colour} box") + (name == f"{colour} half box") for row in sheet.cells for name in row)
        for colour in (words[4], words[6])
    )
    if one == other:
        return None
    return words[4] if (one > other) == (words[3] == "closer") else words[6]


def _distance(content: str) -> str:
    return "far" if "half" in content.split() else "near"


TASKS = (
    board_task(
        "boxes",
        GROUP,
        "CVBench-3D",
        "cv_bench_acc",
        Board(
            tuple(f"{colour} {size}" for colour in COLOURS for size in ("box", "half box")),
            {
                "distance": Aspect(("near", "far"), _distance, choices=2),
                "colour": Aspect(COLOURS, first_word, choices=4),
            },
        ),
        category="Depth",
    ),
    Task(
        "marked_patch",
        GROUP,
        "RealWorldQA",
        "exact_match",
        detail=False,
        draw=draw_marked_patch,
        solve=solve_marked_patch,
        words=say("what colour is in the frame", FRAMES, PHOTO_COLOURS),
    ),
    Task(
        "count",
        GROUP,
        "CVBench-2D",
        "cv_bench_acc",
        detail=False,
        draw=draw_count,
        solve=solve_count,
        words=say("how many figures are", COLOURS, SHAPES, tuple(map(str, range(1, MOST_COUNT + 1)))),
    ),
    Task(
        "relation",
        GROUP,
        "CVBench-2D",
        "cv_bench_acc",
        detail=True,
        draw=draw_relation,
        solve=solve_relation,
        words=say("where is the from", COLOURS, SHAPES, tuple(STEPS)),
    ),
    Task(
        "depth",
        GROUP,
        "CVBench-3D",
        "cv_bench_acc",
        detail=False,
        draw=draw_depth,
        solve=solve_depth,
        words=say("which box is closer farther or", COLOURS),
    ),
)
