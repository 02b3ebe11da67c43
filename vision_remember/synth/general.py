"""General: what stands on the page, of which colour, how often, and beside what."""

from __future__ import annotations

from vision_remember.synth.base import Aspect, Board, Question, Task, pick_questions, say
from vision_remember.synth.boards import board_task, first_word, last_word
from vision_remember.synth.figures import FIGURES, PHRASES, STEPS, draw_pairs, find, side_of
from vision_remember.synth.labels import COLOURS, SHAPES
from vision_remember.synth.page import Draw, Page, Sheet

GROUP = "General"
YES_NO = ("yes", "no")
COUNTS = ("zero", "one", "two", "three", "four", "five", "six")


def draw_attribute(page: Page, draw: Draw) -> list[Question]:
    """One figure of each shape, in different colours, anywhere."""
    colours = draw.sample(COLOURS, len(SHAPES))
    for place, colour, shape in zip(draw.sample(range(page.slots**2), len(SHAPES)), colours, SHAPES, strict=True):
        page.put(*divmod(place, page.slots), f"{colour} {shape}")
    pairs = list(zip(colours, SHAPES, strict=True))
    return pick_questions(
        draw,
        [Question(f"what colour is the {shape}", colour, category="attribute") for colour, shape in pairs]
        + [Question(f"what shape is {colour}", shape, category="object") for colour, shape in pairs],
    )


def solve_attribute(sheet: Sheet, question: Question) -> str | None:
    asked = question.text.split()[-1]
    found = [name.split() for _, _, name in sheet.filled() if asked in name.split()]
    return next(word for word in found[0] if word != asked) if len(found) == 1 else None


def draw_neighbour(page: Page, draw: Draw) -> list[Question]:
    """A crowd of 4 x 4 figures that all differ."""
    top, left = draw.below(page.slots - 3), draw.below(page.slots - 3)
    crowd = draw.sample(FIGURES, 16)
    asked = []
    for place, figure in enumerate(crowd):
        row, column = divmod(place, 4)
        page.put(top + row, left + column, figure)
        side = draw.pick(tuple(STEPS))
        down, across = row + STEPS[side][0], column + STEPS[side][1]
        if 0 <= down < 4 and 0 <= across < 4:
            colour = crowd[4 * down + across].split()[0]
            asked.append(Question(f"what colour is {PHRASES[side]} the {figure}", colour, category="relation"))
    return pick_questions(draw, asked)


def solve_neighbour(sheet: Sheet, question: Question) -> str | None:
    words = question.text.split()
    place = find(sheet, " ".join(words[-2:]))
    if place is None:
        return None
    down, across = STEPS[words[3]]
    name = sheet.at(place[0] + down, place[1] + across)
    return name.split()[0] if name in FIGURES else None


def draw_existence(page: Page, draw: Draw) -> list[Question]:
    """Pairs of questions, one to be answered yes and one no: is it there, and how many are there."""
    shapes = {shape: draw.between(1, 3) for shape in draw.sample(SHAPES, 3)}
    drawn = [f"{draw.pick(COLOURS)} {shape}" for shape, count in shapes.items() for _ in range(count)]
    for place, figure in zip(draw.sample(range(page.slots**2), len(drawn)), drawn, strict=True):
        page.put(*divmod(place, page.slots), figure)
    absent = [figure for figure in FIGURES if figure not in drawn and figure.split()[1] in shapes]
    asked = []
    for figure in draw.sample(sorted(set(drawn)), 3):
        for asked_for, answer in ((figure, "yes"), (draw.pick(absent), "no")):
            asked.append(Question(f"is there a {asked_for}", answer, YES_NO, category="existence"))
    for shape, count in shapes.items():
        wrong = draw.pick([other for other in (1, 2, 3, 4) if other != count])
        for number, answer in ((count, "yes"), (wrong, "no")):
            asked.append(
                Question(f"is the number of {shape} figures {COUNTS[number]}", answer, YES_NO, category="count")
            )
    return asked


def solve_existence(sheet: Sheet, question: Question) -> str | None:
    words = question.text.split()
    drawn = [name for _, _, name in sheet.filled()]
    if question.category == "existence":
        return "yes" if " ".join(words[-2:]) in drawn else "no"
    return "yes" if COUNTS.index(words[-1]) == sum(name.endswith(words[4]) for name in drawn) else "no"


def draw_position(page: Page, draw: Draw) -> list[Question]:
    """Neighbours; each pair of questions asks for the true side and the opposite one."""
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    return [
        Question(f"is the {one} {PHRASES[said]} the {other}", answer, YES_NO, category="position")
        for one, other, side in draw_pairs(page, draw)
        for said, answer in draw.shuffled(((side, "yes"), (opposite[side], "no")))
    ]


def solve_position(sheet: Sheet, question: Question) -> str | None:
    words = question.text.split()
    side = side_of(sheet, " ".join(words[2:4]), " ".join(words[-2:]))
    said = words[4]
    if side is None or (side in ("left", "right")) != (said in ("left", "right")):
        return None
    return "yes" if side == said else "no"


TASKS = (
    board_task(
        "figures",
        GROUP,
        "GQA",
        "exact_match",
        Board(
            FIGURES,
            {"colour": Aspect(COLOURS, first_word), "shape": Aspect(SHAPES, last_word)},
        ),
        category="attribute",
    ),
    Task(
        "attribute",
        GROUP,
        "GQA",
        "exact_match",
        detail=False,
        draw=draw_attribute,
        solve=solve_attribute,
        words=say("what colour shape is the", COLOURS, SHAPES),
    ),
    Task(
        "neighbour",
        GROUP,
        "GQA",
        "exact_match",
        detail=True,
        draw=draw_neighbour,
        solve=solve_neighbour,
        words=say("what colour is left right of above below the", COLOURS, SHAPES),
    ),
    Task(
        "existence",
        GROUP,
        "MME-P",
        "mme_perception_score",
        detail=False,
        draw=draw_existence,
        solve=solve_existence,
        words=say("is there a the number of figures yes no", COLOURS, SHAPES, COUNTS[1:5]),
    ),
    Task(
        "position",
        GROUP,
        "MME-P",
        "mme_perception_score",
        detail=True,
        draw=draw_position,
        solve=solve_position,
        words=say("is the left right of above below yes no", COLOURS, SHAPES),
    ),
)
