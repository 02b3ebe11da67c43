"""Scenes: the table of tasks, and a page for every number."""

from __future__ import annotations

import zlib

from vision_remember.registry import Registry, did_you_mean
from vision_remember.synth import general, knowledge, ocr_chart, vision_centric
from vision_remember.synth.base import Question, Scene, Task
from vision_remember.synth.page import LEVELS, SPLITS, Draw, Page
from vision_remember.synth.render import render

TASKS: Registry[Task] = Registry(
    "task",
    {task.name: task for group in (general, knowledge, ocr_chart, vision_centric) for task in group.TASKS},
)


def _check(split: str, level: str, grid: int, cell: int) -> None:
    for name, value, known in (("split", split, SPLITS), ("level", level, LEVELS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: {did_you_mean(str(value), list(known))}")
    if grid < 12 or grid % 2:
        raise ValueError(f"grid={grid}: a page has an even number of cells along its side, at least 12")
    if cell < 8 or cell % 2:
        raise ValueError(f"cell={cell}: a cell has an even number of pixels along its side, at least 8")


def draw_page(
    task: str, index: int, *, split: str = "train", level: str = "medium", grid: int = 12, cell: int = 8, seed: int = 0
) -> tuple[Page, tuple[Question, ...]]:
    """Draws a page without rendering it; arguments as in ``make_scene``."""
    entry = TASKS[task]
    _check(split, level, grid, cell)
    draw = Draw(task, index, split, level, grid, seed)
    while True:
        page = Page(grid, cell, level, split)
        questions = entry.draw(page, draw)
        # half of all pages belong to the training set, by a checksum of what stands on them: no page can be in both
        if SPLITS[zlib.crc32(page.labels.astype("<i2").tobytes()) % 2] == split and questions:
            return page, tuple(questions)


def make_scene(
    task: str, index: int, *, split: str = "train", level: str = "medium", grid: int = 12, cell: int = 8, seed: int = 0
) -> Scene:
    """Makes a page of a task with its questions; equal arguments make equal scenes.

    Args:
        task: an entry of ``TASKS``.
        index: which page.
        split: "train" or "test". No page with equal labels is in both, whatever index and seed; photographs and samples
            of handwriting are not shared either.
        level: the size of the details: "coarse", 2 x 2 cells; "medium", one cell; "fine", half a cell.
        grid: cells along the side of the page, even, at least 12.
        cell: pixels along the side of a cell, even, at least 8.
        seed: which of many benchmarks with the same rules.
    """
    page, questions = draw_page(task, index, split=split, level=level, grid=grid, cell=cell, seed=seed)
    image = render(page, Draw("render", task, index, split, level, grid, seed))
    return Scene(image, page.labels, questions)


def vocabulary() -> tuple[str, ...]:
    """Every word of all questions and answers, sorted; spelled answers are made of its single characters."""
    return tuple(sorted({word for task in TASKS.values() for word in task.words}))
