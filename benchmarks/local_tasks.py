"""Small files with the columns of the 13 benchmarks, to run the official tasks without a network.

The pictures show a coloured square, a word or a bar, so that every answer can be read off. They say nothing about a
model: they prove that task, prompt, plug-in and metric work together, and that full marks and chance come out as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.official_tasks import BENCHMARKS, Benchmark

SIDE = 96
COLOURS = ("red", "green", "blue", "yellow")
WORDS = ("tea", "milk", "salt", "rice")
LETTERS = "ABCD"

MME_CATEGORIES = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
MMSTAR_CATEGORIES = {
    "coarse perception": "image scene and topic",
    "fine-grained perception": "recognition",
    "instance reasoning": "single-instance reasoning",
    "logical reasoning": "diagram reasoning",
    "science & technology": "electronics & energy & mechanical eng.",
    "math": "geometry",
}
MMMU_SUBJECTS = ("Art", "Economics", "Physics", "Pharmacy", "History", "Energy_and_Power")
OCRBENCH_TYPES = (
    "Regular Text Recognition",
    "Handwriting Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)


@dataclass(frozen=True)
class LocalTask:
    """How one benchmark's rows are made and answered.

    Attributes:
        rows: of the i-th picture; the right answers go round, so that none is more frequent than the others.
        answer: of a row, as a perfect model would say it.
        blind: what a model says that sees neither picture nor row, and always the same.
        chance: what that scores, in the paper's units.
    """

    rows: Callable[[int], list[dict[str, Any]]]
    answer: Callable[[Mapping[str, Any]], str]
    blind: str
    chance: float


def _square(index: int) -> Image.Image:
    page = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(page).rectangle((24, 24, 71, 71), fill=COLOURS[index % 4])
    return page


def _word(index: int) -> Image.Image:
    page = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(page).text((14, 32), WORDS[index % 4], fill="black", font=ImageFont.load_default(32))
    return page


def _bar(value: int) -> Image.Image:
    page = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(page)
    for tick in range(0, 81, 10):
        pen.line((8, SIDE - 8 - tick, 14, SIDE - 8 - tick), fill="black")
    pen.rectangle((32, SIDE - 8 - value, 63, SIDE - 8), fill="blue")
    return page


def _options(index: int) -> tuple[list[str], int]:
    """Four colours, and the place of the right one, which goes round at another pace than the colour."""
    place = (index // 4) % 4
    others = [colour for colour in COLOURS if colour != COLOURS[index % 4]]
    return [*others[:place], COLOURS[index % 4], *others[place:]], place


def _listed(options: list[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))


def _gqa(index: int) -> list[dict[str, Any]]:
    return [{"image": _square(index), "question": "What color is the square?", "answer": COLOURS[index % 4]}]


def _mme(index: int) -> list[dict[str, Any]]:
    """A pair for one picture: a question to affirm and one to deny."""
    page, category = _square(index), MME_CATEGORIES[index % len(MME_CATEGORIES)]
    asked = {"Yes": COLOURS[index % 4], "No": COLOURS[(index + 1) % 4]}
    return [
        {
            "question_id": f"{category}/{index:04d}.png",
            "image": page,
            "question": f"Is the square {colour}? Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for answer, colour in asked.items()
    ]


def _mmstar(index: int) -> list[dict[str, Any]]:
    options, place = _options(index)
    # sixteen in a row belong together, so that every category has each answer equally often
    category, second = list(MMSTAR_CATEGORIES.items())[(index // 16) % len(MMSTAR_CATEGORIES)]
    listed = ", ".join(f"{letter}: {option}" for letter, option in zip(LETTERS, options, strict=True))
    return [
        {
            "index": index,
            "image": _square(index),
            "question": f"What color is the square?\nOptions: {listed}",
            "answer": LETTERS[place],
            "category": category,
            "l2_category": second,
        }
    ]


def _mmmu(index: int) -> list[dict[str, Any]]:
    options, place = _options(index)
    subject = MMMU_SUBJECTS[index % len(MMMU_SUBJECTS)]
    return [
        {
            "id": f"validation_{subject}_{index + 1}",
            "question": "What color is the square in <image 1>?",
            "options": repr(options),
            "answer": LETTERS[place],
            "question_type": "multiple-choice",
            "image_1": _square(index),
        }
    ]


def _scienceqa(index: int) -> list[dict[str, Any]]:
    options, place = _options(index)
    question = "Which color does the square have?"
    hint = "A square has four equal sides."
    return [{"image": _square(index), "question": question, "choices": options, "answer": place, "hint": hint}]


def _ai2d(index: int) -> list[dict[str, Any]]:
    options, place = _options(index)
    question = "Which color does the diagram's square have?"
    return [{"image": _square(index), "question": question, "options": options, "answer": str(place)}]


def _chartqa(index: int) -> list[dict[str, Any]]:
    value = 20 * (index % 4 + 1)
    kind = ("human_test", "augmented_test")[(index // 4) % 2]
    return [{"type": kind, "image": _bar(value), "question": "How high is the bar?", "answer": str(value)}]


def _docvqa(index: int) -> list[dict[str, Any]]:
    return [{"image": _word(index), "question": "What is written?", "answers": [WORDS[index % 4]]}]


def _textvqa(index: int) -> list[dict[str, Any]]:
    return [
        {
            "image": _word(index),
            "question_id": index,
            "question": "what is written on the sign?",
            "answers": [WORDS[index % 4]] * 10,
        }
    ]


def _ocrbench(index: int) -> list[dict[str, Any]]:
    return [
        {
            "dataset": "rendered",
            "image": _word(index),
            "question": "what is written in the image?",
            "question_type": OCRBENCH_TYPES[(index // 4) % len(OCRBENCH_TYPES)],
            "answer": [WORDS[index % 4]],
        }
    ]


def _realworldqa(index: int) -> list[dict[str, Any]]:
    options, place = _options(index)
    request = "Please answer directly with only the letter of the correct option and nothing else."
    question = f"Which color is the sign?\n\n{_listed(options)}\n{request}"
    return [{"image": _square(index), "question": question, "answer": LETTERS[place]}]


def _cv_bench(index: int, kind: str) -> list[dict[str, Any]]:
    options, place = _options(index)
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return [
        {
            "idx": index,
            "type": kind,
            "task": {"2D": "Relation", "3D": "Depth"}[kind],
            "image": _square(index),
            "choices": options,
            "answer": f"({LETTERS[place]})",
            "prompt": f"What color is the square? Select from the following choices.\n{listed}",
            "source": {"2D": "ADE20K", "3D": "Omni3D"}[kind],
        }
    ]


def _stated(row: Mapping[str, Any]) -> str:
    return str(row["answer"])


def _first_of_several(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: str(row[name][0])


def _letter(row: Mapping[str, Any]) -> str:
    return LETTERS[int(row["answer"])]


# A constant "Yes" is right once in each pair of MME's questions and never twice: 50 of a category's 200 points.
LOCAL_TASKS: Mapping[str, LocalTask] = {
    "GQA": LocalTask(_gqa, _stated, "red", 25.0),
    "MME-P": LocalTask(_mme, _stated, "Yes", 50.0 * len(MME_CATEGORIES)),
    "MMStar": LocalTask(_mmstar, _stated, "A", 25.0),
    "MMMU": LocalTask(_mmmu, _stated, "A", 25.0),
    "SQA-I": LocalTask(_scienceqa, _letter, "A", 25.0),
    "AI2D": LocalTask(_ai2d, _letter, "A", 25.0),
    "ChartQA": LocalTask(_chartqa, _stated, "20", 25.0),
    "DocVQA": LocalTask(_docvqa, _first_of_several("answers"), "tea", 25.0),
    "TextVQA": LocalTask(_textvqa, _first_of_several("answers"), "tea", 25.0),
    "OCRBench": LocalTask(_ocrbench, _first_of_several("answer"), "tea", 25.0),
    "RWQA": LocalTask(_realworldqa, _stated, "A", 25.0),
    "CVBench-2D": LocalTask(lambda index: _cv_bench(index, "2D"), _stated, "A", 25.0),
    "CVBench-3D": LocalTask(lambda index: _cv_bench(index, "3D"), _stated, "A", 25.0),
}
assert list(LOCAL_TASKS) == list(BENCHMARKS)


def rows(benchmark: Benchmark, pictures: int) -> list[dict[str, Any]]:
    """The rows of so many pictures, with exactly the columns that the official task reads."""
    made = [row for index in range(pictures) for row in LOCAL_TASKS[benchmark.name].rows(index)]
    assert all(row.keys() == set(benchmark.columns) for row in made)
    return made


def write_parquet(made: list[dict[str, Any]], file: Path) -> None:
    """Writes rows, pictures included, as datasets of the hub are stored."""
    from datasets import Dataset

    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(made).to_parquet(str(file))


def write_local_data(folder: Path, pictures: int = 16) -> None:
    """Writes ``<task>.parquet`` for all 13 benchmarks.

    Args:
        folder: made if missing.
        pictures: of each; a multiple of 16 makes all answers equally frequent. MMStar gets 16 for each of its six
            categories, over which its score is a mean.
    """
    for benchmark in BENCHMARKS.values():
        number = len(MMSTAR_CATEGORIES) * 16 if benchmark.name == "MMStar" else pictures
        write_parquet(rows(benchmark, number), folder / f"{benchmark.task}.parquet")
