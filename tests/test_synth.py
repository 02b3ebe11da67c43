"""The rendered benchmark: labels, questions and answers agree, splits share nothing, equal arguments equal scenes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from vision_remember.synth import (
    GROUPS,
    LABEL_PARTS,
    LABELS,
    LEVELS,
    PARTS,
    SPLITS,
    TASKS,
    Sheet,
    make_scene,
    vocabulary,
)
from vision_remember.synth.page import Draw
from vision_remember.synth.scene import draw_page
from vision_remember.synth.sources import PHOTOS, handwriting
from vision_remember.synth.tiles import FACES, tiles

VOCABULARY = set(vocabulary())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", TASKS)
def test_the_labels_alone_give_every_answer(task: str, level: str) -> None:
    for grid in (12, 24):
        for split in SPLITS:
            for index in range(10):
                page, questions = draw_page(task, index, split=split, level=level, grid=grid)
                sheet = Sheet(page.labels, level)
                assert 1 <= len(questions) <= 16
                for question in questions:
                    assert TASKS[task].solve(sheet, question) == question.answer


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_changes_with_the_page(task: str) -> None:
    """The oracle reads: asked the same questions of other pages, it does not repeat the answers."""
    first, others = draw_page(task, 0), [draw_page(task, index)[0] for index in range(1, 9)]
    answers = {
        (question.text, TASKS[task].solve(Sheet(page.labels, "medium"), question))
        for page in (first[0], *others)
        for question in first[1]
    }
    assert len(answers) > len(first[1])


@pytest.mark.parametrize("task", TASKS)
def test_questions_and_answers_keep_to_the_vocabulary(task: str) -> None:
    for level in LEVELS:
        for index in range(30):
            for question in draw_page(task, index, level=level)[1]:
                assert {*question.text.split(), *question.answer_tokens} <= VOCABULARY
                assert "".join(question.answer_tokens) == question.answer.replace(" ", "")
                assert len(question.text.split()) <= 10
                assert len(question.answer_tokens) <= 4
                if question.choices is not None:
                    assert len(set(question.choices)) == len(question.choices) >= 2
                    assert question.choices["ABCD".index(question.letter or "")] == question.answer


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_share_no_page(task: str) -> None:
    pages = {
        split: {
            draw_page(task, index, split=split, level=level, seed=seed)[0].labels.tobytes()
            for level in LEVELS
            for seed in (0, 1)
            for index in range(40)
        }
        for split in SPLITS
    }
    assert pages["train"].isdisjoint(pages["test"])
    assert min(map(len, pages.values())) > 200  # and pages do differ


def test_photographs_and_samples_of_handwriting_are_split_without_overlap() -> None:
    assert set(PHOTOS["train"]).isdisjoint(PHOTOS["test"])
    for digit in range(10):
        samples = {split: {one.tobytes() for one in handwriting(split, digit, 8, 8)} for split in SPLITS}
        assert samples["train"].isdisjoint(samples["test"])
        assert min(map(len, samples.values())) > 80


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", TASKS)
def test_equal_arguments_make_equal_scenes(task: str, level: str) -> None:
    one, again, other = (make_scene(task, index, level=level) for index in (3, 3, 4))
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.labels, again.labels)
    assert one.questions == again.questions
    assert not np.array_equal(one.image, other.image)
    assert one.image.shape == (96, 96, 3)
    assert one.image.dtype == np.uint8
    assert one.labels.shape == (12, 12)
    assert one.labels.dtype == np.int16


def test_scenes_stay_what_they_are() -> None:
    """Labels and questions of every task that reads no photograph, whatever version of the libraries draws them."""
    digest = hashlib.sha256()
    for task in TASKS:
        if task not in ("marked_patch", "sign"):
            for level in LEVELS:
                page, questions = draw_page(task, 5, level=level)
                digest.update(page.labels.astype("<i2").tobytes() + repr(questions).encode())
    assert digest.hexdigest() == "2b6ddc78f1384e9ec6fa4a62da9f9ccdb023fcf3c2a61c3da301d69928c8a76b"


def test_the_page_shows_what_a_scene_holds() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "synth.md").read_text(encoding="utf-8")
    made, call = re.findall(r"^(scene) = (make_scene\(.*\))$", page, re.MULTILINE)[0]
    names = {made: eval(call)}
    shown = re.findall(r'^(scene\.\S+) +# "(.*)"$', page, re.MULTILINE)
    assert len(shown) == 2
    for expression, text in shown:
        assert eval(expression, names) == text


def test_draws_are_the_same_everywhere() -> None:
    draw = Draw("a", 1)
    assert [draw.below(100) for _ in range(5)] == [26, 33, 78, 0, 92]


@pytest.mark.parametrize(("grid", "cell"), [(24, 14), (24, 28)])
def test_other_sizes(grid: int, cell: int) -> None:
    scene = make_scene("characters", 0, grid=grid, cell=cell, level="fine")
    assert scene.image.shape == (grid * cell, grid * cell, 3)
    assert scene.labels.shape == (grid, grid)
    assert scene.image[-cell:, -cell:].std() > 1  # noise down to the last corner, which is empty paper


def test_labels_are_a_closed_vocabulary() -> None:
    assert LABELS[0] == "blank"
    assert len(set(LABELS)) == len(LABELS)
    assert LABEL_PARTS.shape == (len(LABELS), 2)
    for name, parts in zip(LABELS, LABEL_PARTS, strict=True):
        left, right = (PARTS[part] for part in parts)
        halves = name.split("+") if "+" in name else [name, name]
        assert [left, right] == [half or "blank" for half in halves]


@pytest.mark.parametrize("level", LEVELS)
def test_different_contents_look_different(level: str) -> None:
    """No two labels share a tile, but for handwriting, which is pasted, and what shows the photograph behind."""
    pictures = tiles(8, level, FACES[0], (15, 15, 15))
    seen: dict[bytes, str] = {}
    for index, name in enumerate(LABELS):
        if "hand" not in name and name != "photo" and "frame" not in name:
            picture = pictures.colour[index].tobytes() + pictures.free[index].tobytes()
            assert picture not in seen, f"{name} looks like {seen.get(picture)}"
            seen[picture] = name


def test_groups_have_tasks_with_and_without_detail() -> None:
    for group in GROUPS:
        tasks = [task for task in TASKS.values() if task.group == group]
        assert len(tasks) >= 3
        assert {task.detail for task in tasks} == {True, False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tst"}, "unknown split 'tst': did you mean 'test'"),
        ({"level": "tiny"}, "unknown level 'tiny': "),
        ({"grid": 13}, "grid=13: a page has an even number of cells along its side, at least 12"),
        ({"grid": 8}, "grid=8: "),
        ({"cell": 7}, "cell=7: a cell has an even number of pixels along its side, at least 8"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scene("bars", 0, **options)  # type: ignore[arg-type]


def test_an_unknown_task_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match="unknown task 'bar': did you mean 'bars'"):
        make_scene("bar", 0)
