"""What can be answered blind or from bags of cells."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from vision_remember.synth import TASKS, baselines
from vision_remember.synth.baselines import arrangements, bag_accuracy, blind_accuracy, pooled_groups, rearrange
from vision_remember.synth.page import Draw, Sheet
from vision_remember.synth.scene import draw_page


@pytest.mark.parametrize("board", [False, True])
@pytest.mark.parametrize(("unit", "pool"), [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4)])
def test_rearranged_pages_keep_every_bag(unit: int, pool: int, board: bool) -> None:
    rng = np.random.default_rng(0)
    slots = rng.integers(0, 50, (12 // unit, 12 // unit)).astype(np.int16)
    labels = slots.repeat(unit, 0).repeat(unit, 1)
    groups = pooled_groups(12, unit, pool)
    moved = rearrange(labels, unit, groups, list(arrangements(groups, board, rng))[-1])
    for top in range(0, 12, pool):
        for left in range(0, 12, pool):
            cell = np.s_[top : top + pool, left : left + pool]
            assert Counter(labels[cell].ravel().tolist()) == Counter(moved[cell].ravel().tolist())
    assert np.array_equal(labels, moved) == (not groups)
    assert bool(groups) == (unit == 1 or pool == 4)  # 2 x 2 contents are alone in, or cut alike by, smaller cells


@pytest.mark.parametrize("task", TASKS)
def test_a_bag_tells_the_answer_exactly_where_no_detail_is_asked(task: str) -> None:
    accuracy = bag_accuracy(task, 2, scenes=12)
    assert accuracy < 0.85 if TASKS[task].detail else accuracy > 0.9


@pytest.mark.parametrize("task", TASKS)
def test_a_cell_of_its_own_tells_everything(task: str) -> None:
    assert bag_accuracy(task, 1, scenes=5) == 1


@pytest.mark.parametrize("pool", [2, 3, 4])
@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.board is not None])
def test_a_board_is_answered_by_what_is_most_frequent_under_a_pooled_cell(task: str, pool: int) -> None:
    """Counted by hand: of the contents under the cell that a question names, what most have in common."""
    board, scores = TASKS[task].board, []
    assert board is not None
    for index in range(6):
        page, asked = draw_page(task, index, split="test", level="medium", grid=12)
        for question in Draw("bag", index).shuffled(asked)[:3]:
            words = question.text.split()
            row, column = (int(words[words.index(name) + 1]) - 1 for name in ("row", "column"))
            top, left = row // pool * pool, column // pool * pool
            found: Counter[str] = Counter()
            for label in page.labels[top : top + pool, left : left + pool].ravel():
                swapped = page.labels.copy()
                swapped[row, column] = label
                answer = TASKS[task].solve(Sheet(swapped, "medium"), question)
                found.update([] if answer is None else [answer])
            winners = [answer for answer, count in found.items() if count == max(found.values())]
            scores.append((question.answer in winners) / len(winners))
    assert bag_accuracy(task, pool, scenes=6, questions=3) == pytest.approx(np.mean(scores))


def test_characters_reach_the_known_ceiling_of_bags() -> None:
    """Four letters in a pooled cell: guessing the most frequent one among them is right in 32 % of cases."""
    assert bag_accuracy("characters", 2, scenes=100, questions=16) == pytest.approx(0.32, abs=0.02)


def test_answers_that_are_equally_frequent_share(monkeypatch: pytest.MonkeyPatch) -> None:
    right = itertools.cycle([True, False])
    task = dataclasses.replace(TASKS["characters"], solve=lambda _, asked: asked.answer if next(right) else "another")
    monkeypatch.setattr(baselines, "TASKS", {"characters": task})
    assert bag_accuracy("characters", 2, scenes=3, questions=1) == 0.5  # four arrangements of four cells


@pytest.mark.parametrize("task", ["sequence", "table_rule", "gears", "relation", "position"])
def test_options_in_random_order_leave_nothing_to_the_blind(task: str) -> None:
    found = blind_accuracy(task, scenes=300)
    assert abs(found.blind - found.chance) < 0.08


def test_a_pool_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="pool=13: a pooled cell is 1 to 12 cells wide here"):
        bag_accuracy("bars", 13)
