"""Scenes as rows of the mirrored benchmarks, with the columns that lmms-eval's own task files read."""

from __future__ import annotations

import io
from typing import Any

from vision_remember.synth.base import Question, Task
from vision_remember.synth.scene import TASKS, make_scene
from vision_remember.synth.sources import needed


def _with_options(question: Question, form: str) -> str:
    """The question, and its choices as lines of a form such as ``"{}. {}"``."""
    lines = (form.format(*pair) for pair in zip("ABCDEFGH", question.choices or (), strict=False))
    return "\n".join([question.text, *lines])


def _columns(task: Task, question: Question, number: int, identity: str) -> dict[str, Any]:
    """The benchmark's own columns; ``number`` counts questions, ``identity`` names the scene."""
    text, answer, letter = question.text, question.answer, question.letter
    choices = list(question.choices or ())
    place = choices.index(answer) if choices else None
    columns: dict[str, dict[str, Any]] = {
        "GQA": {"answer": answer, "imageId": identity},
        "MME-P": {"answer": answer.capitalize(), "category": question.category},
        "AI2D": {"options": choices, "answer": str(place)},
        "ScienceQA": {"choices": choices, "answer": place, "hint": task.hint},
        "MMStar": {
            "question": _with_options(question, "{}. {}"),
            "answer": letter,
            "index": number,
            "category": "fine-grained perception",
            "l2_category": question.category,
        },
        "MMMU": {
            "question": f"<image 1> {text}",
            "options": str(choices),
            "answer": letter or answer,
            "id": f"validation_{question.category}_{number}",
            "question_type": "multiple-choice" if choices else "open",
        },
        "ChartQA": {"answer": answer, "type": question.category},
        "DocVQA": {"answers": [answer], "questionId": str(number)},
        "TextVQA": {"answer": answer, "answers": list(question.answers)},
        "OCRBench": {"answer": [answer], "dataset": "vision-remember", "question_type": question.category},
        "RealWorldQA": {"question": _with_options(question, "{}. {}"), "answer": letter or answer},
        "CVBench-2D": {"source": "COCO"},
        "CVBench-3D": {"source": "Omni3D"},
    }
    own = columns[task.mirrors]
    if task.mirrors.startswith("CVBench"):
        own |= {
            "idx": number,
            "type": task.mirrors[-2:],
            "task": question.category,
            "choices": choices,
            "answer": f"({letter})",
            "prompt": _with_options(question, "({}) {}"),
        }
    return {"question": text, **own}


def rows(
    task: str,
    n: int,
    *,
    split: str = "test",
    level: str = "medium",
    grid: int = 12,
    cell: int = 8,
    seed: int = 0,
    png: bool = False,
) -> list[dict[str, Any]]:
    """The questions of the first ``n`` scenes of a task, one row each.

    Besides the benchmark's own columns every row has ``question_id``, ``image`` (MMMU: ``image_1``), ``task_name``,
    ``split`` and ``level``. The two questions of a pair in MME-P share their ``question_id``, as its score wants.

    Args:
        task: an entry of ``TASKS``.
        n: scenes.
        split, level, grid, cell, seed: as in ``make_scene``.
        png: the image as a mapping with PNG bytes, as ``datasets`` stores images in parquet files, not as a PIL image.
    """
    if n < 1:
        raise ValueError(f"n={n}: expected at least one scene")
    with needed():
        from PIL import Image
    entry = TASKS[task]
    answer: list[dict[str, Any]] = []
    for index in range(n):
        scene = make_scene(task, index, split=split, level=level, grid=grid, cell=cell, seed=seed)
        picture: Any = Image.fromarray(scene.image)
        if png:
            file = io.BytesIO()
            picture.save(file, "PNG")
            picture = {"bytes": file.getvalue(), "path": None}
        identity = f"{task}-{split}-{level}-{seed}-{index}"
        for place, question in enumerate(scene.questions):
            part = place // 2 if entry.mirrors == "MME-P" else place
            image_column = "image_1" if entry.mirrors == "MMMU" else "image"
            answer.append(
                {
                    "question_id": f"{identity}-{part}",
                    image_column: picture,
                    "task_name": task,
                    "split": split,
                    "level": level,
                    **_columns(entry, question, len(answer), identity),
                }
            )
    return answer
