"""The rendered benchmark: labels, questions and answers agree, splits share nothing, equal arguments equal scenes."""

from __future__ import annotations

import pytest

from vision_remember.synth import LABELS, LEVELS, SPLITS, TASKS, Sheet, make_scene, vocabulary

VOCABULARY = set(vocabulary())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", TASKS)
def test_the_labels_alone_give_every_answer(task: str, level: str) -> None:
    for split in SPLITS:
        for index in range(12):
            scene = make_scene(task, index, split=split, level=level)
            sheet = Sheet(scene.labels, level)
            for question in scene.questions:
                assert TASKS[task].solve(sheet, question) == question.answer


@pytest.mark.parametrize("task", TASKS)
def test_questions_and_answers_keep_to_the_vocabulary(task: str) -> None:
    for level in LEVELS:
        for index in range(20):
            for question in make_scene(task, index, level=level).questions:
                assert {*question.text.split(), *question.answer_tokens} <= VOCABULARY
                assert "".join(question.answer_tokens) == question.answer.replace(" ", "")


def test_labels_are_a_closed_vocabulary() -> None:
    assert LABELS[0] == "blank"
    assert len(set(LABELS)) == len(LABELS)
