"""What can be answered without seeing the page, or with pooled cells that hold a bag of what they cover."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vision_remember.synth.base import Question
from vision_remember.synth.page import Draw, Sheet
from vision_remember.synth.scene import TASKS, draw_page

ENOUGH = 128  # sampled arrangements that tell an answer: with 16, a close second won too often
MOST_TRIES = 1000


@dataclass(frozen=True)
class Blind:
    """Accuracies in 0..1 without an image.

    Attributes:
        chance: one of the choices at random, or one of the answers that the question had in the training set.
        blind: the most frequent answer that the question had in the training set.
    """

    chance: float
    blind: float


def _questions(task: str, split: str, level: str, grid: int, scenes: int) -> list[Question]:
    return [
        question
        for index in range(scenes)
        for question in draw_page(task, index, split=split, level=level, grid=grid)[1]
    ]


def blind_accuracy(task: str, *, level: str = "medium", grid: int = 12, scenes: int = 1000) -> Blind:
    """The best constant answer to each question, counted on training scenes and scored on as many test scenes."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question in _questions(task, "train", level, grid, scenes):
        answers[question.text][question.answer] += 1
        overall[question.answer] += 1
    chances, hits = [], []
    for question in _questions(task, "test", level, grid, scenes):
        known = answers.get(question.text, overall)
        chances.append(1 / len(question.choices or known))
        # a choice that is not offered is no answer
        offered = {answer: count for answer, count in known.items() if answer in (question.choices or known)}
        guess = max(sorted(offered), key=lambda answer: offered[answer]) if offered else ""
        hits.append(guess == question.answer)
    return Blind(float(np.mean(chances)), float(np.mean(hits)))


def pooled_groups(grid: int, unit: int, pool: int) -> list[NDArray[np.int64]]:
    """Slots that a bag of cells cannot tell apart.

    Two slots may change places without changing any bag if each pooled cell covers as much of the one as of the other.

    Args:
        grid: cells along the side of the page.
        unit: cells along the side of a slot.
        pool: cells along the side of a pooled cell.

    Returns:
        The groups with more than one slot, as indices into the slots in raster order.
    """
    slots = grid // unit
    sides = [tuple(cell // pool for cell in range(slot * unit, (slot + 1) * unit)) for slot in range(slots)]
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    for slot in range(slots**2):
        row, column = divmod(slot, slots)
        groups[sides[row], sides[column]].append(slot)
    return [np.array(group) for group in groups.values() if len(group) > 1]


def arrangements(
    groups: list[NDArray[np.int64]], board: bool, rng: np.random.Generator
) -> Iterator[list[NDArray[np.int64]]]:
    """Groups in other orders: at random, or of a board, whose questions ask for one slot, as many as bring each content
    of a group to each of its slots equally often."""
    if board or not groups:
        for shift in range(math.lcm(*map(len, groups))):
            yield [np.roll(group, shift) for group in groups]
    else:
        for _ in range(MOST_TRIES):
            yield [rng.permutation(group) for group in groups]


def rearrange(
    labels: NDArray[np.int16], unit: int, groups: list[NDArray[np.int64]], orders: list[NDArray[np.int64]]
) -> NDArray[np.int16]:
    """A page with the same bags: slots change places within their groups."""
    slots = len(labels) // unit
    order = np.arange(slots**2)
    for group, new in zip(groups, orders, strict=True):
        order[group] = new
    cut = labels.reshape(slots, unit, slots, unit).transpose(0, 2, 1, 3).reshape(slots**2, unit, unit)
    return cut[order].reshape(slots, slots, unit, unit).transpose(0, 2, 1, 3).reshape(labels.shape)


def bag_accuracy(
    task: str, pool: int, *, level: str = "medium", grid: int = 12, scenes: int = 40, questions: int = 4, seed: int = 0
) -> float:
    """Accuracy of the best answer if each pooled cell is only the bag of its cells' contents.

    Pages with the same bags are made by moving contents inside pooled cells, and asked again; the most frequent answer
    counts, as exact match. Of a board that is exact; of other tasks arrangements are sampled. Those that do not tell an
    answer, such as a bar in mid-air, are no pages. Where no sampled arrangement is a page, the true one is the only
    candidate and counts as right.

    Args:
        task: an entry of ``TASKS``.
        pool: cells along the side of a pooled cell.
        level, grid: as in ``make_scene``.
        scenes: test scenes to ask about.
        questions: of each scene at most.
        seed: of the arrangements.

    Returns:
        In 0..1; where several answers are equally frequent, their share.
    """
    if not 1 <= pool <= grid:
        raise ValueError(f"pool={pool}: a pooled cell is 1 to {grid} cells wide here")
    rng, solve, board = np.random.default_rng(seed), TASKS[task].solve, TASKS[task].board is not None
    scores = []
    for index in range(scenes):
        page, asked = draw_page(task, index, split="test", level=level, grid=grid)
        groups = pooled_groups(grid, page.unit, pool)
        asked = tuple(Draw("bag", index).shuffled(asked)[:questions])
        votes: list[Counter[str]] = [Counter() for _ in asked]
        for orders in arrangements(groups, board, rng):
            sheet = Sheet(rearrange(page.labels, page.unit, groups, orders), level)
            for question, vote in zip(asked, votes, strict=True):
                answer = solve(sheet, question)
                if answer is not None:
                    vote[answer] += 1
            if not board and min(sum(vote.values()) for vote in votes) >= ENOUGH:
                break
        for question, vote in zip(asked, votes, strict=True):
            best = max(vote.values(), default=0)
            winners = [answer for answer, count in vote.items() if count == best] or [question.answer]
            scores.append((question.answer in winners) / len(winners))
    return float(np.mean(scores))
