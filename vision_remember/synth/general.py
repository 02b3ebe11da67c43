"""General: what stands on the page, of which colour, and beside what."""

from __future__ import annotations

from vision_remember.synth.base import Question, Task, pick_questions, say
from vision_remember.synth.labels import COLOURS, SHAPES
from vision_remember.synth.page import Draw, Page, Sheet

GROUP = "General"


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


TASKS = (
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
)
