"""Rows with the columns of the mirrored benchmarks."""

from __future__ import annotations

import ast
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vision_remember.synth import TASKS, make_scene, rows
from vision_remember.synth.sources import needed

# what the task files of lmms-eval 0.7.3 read
COLUMNS = {
    "GQA": {"question", "answer", "imageId", "image"},
    "MME-P": {"question", "answer", "category", "question_id", "image"},
    "AI2D": {"question", "options", "answer", "image"},
    "ScienceQA": {"question", "choices", "answer", "hint", "image"},
    "MMStar": {"question", "answer", "index", "category", "l2_category", "image"},
    "MMMU": {"question", "options", "answer", "id", "question_type", "image_1"},
    "OCRBench": {"question", "answer", "dataset", "question_type", "image"},
    "DocVQA": {"question", "answers", "questionId", "image"},
    "TextVQA": {"question", "answers", "question_id", "image"},
    "ChartQA": {"question", "answer", "type", "image"},
    "RealWorldQA": {"question", "answer", "image"},
    "CVBench-2D": {"prompt", "choices", "answer", "idx", "type", "task", "source", "image"},
    "CVBench-3D": {"prompt", "choices", "answer", "idx", "type", "task", "source", "image"},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_question_is_a_row_with_the_columns_of_its_benchmark(task: str) -> None:
    found = rows(task, 2, level="fine", seed=3)
    scenes = [make_scene(task, index, split="test", level="fine", seed=3) for index in range(2)]
    assert len(found) == sum(len(scene.questions) for scene in scenes)
    column = "image_1" if TASKS[task].mirrors == "MMMU" else "image"
    for row in found:
        assert row.keys() >= COLUMNS[TASKS[task].mirrors]
    assert np.array_equal(np.asarray(found[0][column]), scenes[0].image)
    assert np.array_equal(np.asarray(found[-1][column]), scenes[-1].image)


def test_all_thirteen_benchmarks_of_the_paper_are_mirrored() -> None:
    assert {task.mirrors for task in TASKS.values()} == set(COLUMNS)


def test_pairs_of_mme_share_their_number_and_differ_in_their_answer() -> None:
    for task in ("existence", "position"):
        found = rows(task, 20)
        pairs: dict[str, set[str]] = {}
        for row in found:
            pairs.setdefault(row["question_id"], set()).add(row["answer"])
        assert set(Counter(row["question_id"] for row in found).values()) == {2}
        assert all(answers == {"Yes", "No"} for answers in pairs.values())


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.mirrors != "MME-P"])
def test_other_questions_have_numbers_of_their_own(task: str) -> None:
    numbers = [row["question_id"] for row in rows(task, 5)]
    assert len(set(numbers)) == len(numbers)


def test_letters_point_at_the_answer() -> None:
    question = make_scene("sequence", 0, split="test").questions[0]
    assert question.choices is not None
    place = question.choices.index(question.answer)
    mmstar = rows("sequence", 1)[0]
    assert mmstar["answer"] == "ABCD"[place]
    assert mmstar["question"].splitlines()[1 + place] == f"{'ABCD'[place]}. {question.answer}"
    for row in rows("food_chain", 3):
        assert row["options"][int(row["answer"])] in "abcdefghjklmnprstuxz"
    for row in rows("gears", 3):
        assert ast.literal_eval(row["options"])["AB".index(row["answer"])] in ("clockwise", "counterclockwise")
    for row in rows("count", 3):
        assert f"{row['answer']} {row['choices']['ABCD'.index(row['answer'][1])]}" in row["prompt"]


def test_images_can_be_png_bytes() -> None:
    plain, packed = rows("bars", 1)[0]["image"], rows("bars", 1, png=True)[0]["image"]
    assert packed["bytes"].startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(packed["bytes"]))), np.asarray(plain))


def test_no_scenes_are_an_error() -> None:
    with pytest.raises(ValueError, match="n=0: expected at least one scene"):
        rows("bars", 0)


def test_a_missing_library_names_the_extra() -> None:
    with (
        pytest.raises(ImportError, match=r"'skimage'.*pip install 'vision-remember\[synth\]'"),
        needed(),
    ):
        raise ImportError("No module named 'skimage'")
