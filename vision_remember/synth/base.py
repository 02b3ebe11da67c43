"""What a task is: how its pages are drawn and asked about, and how its answers are read off the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vision_remember.synth.page import Draw, Page, Sheet

GROUPS = ("General", "Knowledge", "OCR & Chart", "Vision-Centric")
MOST_QUESTIONS = 16


@dataclass(frozen=True)
class Question:
    """One question about a page.

    Attributes:
        text: lower case words, nothing glued to them.
        answer: the answer as the metric wants it: ``"3a7"``, ``"red"``, ``"12"``.
        choices: what can be chosen from, in the order of the options, or None for an open question.
        category: the part of the mirrored benchmark that the question belongs to.
        spelled: whether the answer is spelled, one token per character, as values of forms are.
    """

    text: str
    answer: str
    choices: tuple[str, ...] | None = None
    category: str = ""
    spelled: bool = False

    @property
    def answer_tokens(self) -> tuple[str, ...]:
        """The answer in words of ``vocabulary()``."""
        return tuple(self.answer) if self.spelled else tuple(self.answer.split())

    @property
    def answers(self) -> tuple[str, ...]:
        """Ten annotators' answers, for soft accuracy; drawn pages leave them no room to disagree."""
        return (self.answer,) * 10

    @property
    def letter(self) -> str | None:
        """The option's letter, ``"A"``, ``"B"`` ...; None for an open question."""
        return None if self.choices is None else "ABCDEFGH"[self.choices.index(self.answer)]


@dataclass(frozen=True)
class Scene:
    """A rendered page and what is asked about it.

    Attributes:
        image: (grid * cell, grid * cell, 3), uint8.
        labels: (grid, grid), what each cell holds, as indices into ``LABELS``.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.int16]
    questions: tuple[Question, ...]


Drawer: TypeAlias = Callable[[Page, Draw], list[Question]]
Solver: TypeAlias = Callable[[Sheet, Question], str | None]


@dataclass(frozen=True)
class Aspect:
    """One thing that a board can be asked about each of its slots.

    Attributes:
        answers: everything that can be answered.
        of: the answer for a content.
        choices: how many options the question offers; 0 for an open question.
    """

    answers: tuple[str, ...]
    of: Callable[[str], str]
    choices: int = 0


@dataclass(frozen=True)
class Board:
    """Pages full of random contents, asked about by row and column.

    Attributes:
        contents: labels that a slot can hold.
        aspects: by the word that asks for them: "colour" asks "what colour is in row 3 column 7".
    """

    contents: tuple[str, ...]
    aspects: Mapping[str, Aspect]


@dataclass(frozen=True)
class Task:
    """One task of the benchmark.

    Attributes:
        group: one of ``GROUPS``.
        mirrors: the paper's benchmark that it stands for.
        metric: the name of that benchmark's official metric.
        detail: whether the answer at level ``medium`` needs to know which cell of a 2 x 2 block holds what.
        draw: draws a page and returns the questions about it.
        solve: answers a question from the labels alone; None where they do not tell.
        words: what its questions and answers say.
        hint: a fact that the questions build on, for ScienceQA's column of that name.
        board: what its pages are full of, where they are boards.
    """

    name: str
    group: str
    mirrors: str
    metric: str
    detail: bool
    draw: Drawer
    solve: Solver
    words: tuple[str, ...]
    hint: str = ""
    board: Board | None = None


def say(text: str, *more: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a text and of some tables."""
    return (*text.split(), *(word for table in more for word in table))


def pick_questions(draw: Draw, questions: list[Question]) -> list[Question]:
    """As many questions as a scene may have, in random order."""
    return draw.sample(questions, min(MOST_QUESTIONS, len(questions)))


def options(draw: Draw, answer: str, others: list[str], count: int = 4) -> tuple[str, ...]:
    """The answer among ``count - 1`` others, in random order."""
    return tuple(draw.shuffled([answer, *draw.sample(others, min(count - 1, len(others)))]))
