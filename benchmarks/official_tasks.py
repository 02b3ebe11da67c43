"""The paper's 13 benchmarks as lmms-eval runs them: which task, which of its metrics, and where its data lie."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper_tables import COLUMNS, GROUPS
from vision_remember.registry import Registry

OCRBENCH_SIZE = 1000
"""lmms-eval divides OCRBench's hits by its full size, however few questions are asked."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: in the paper's tables.
        task: of lmms-eval.
        file: of the task, below lmms-eval's folder of tasks.
        split: that the task evaluates.
        metric: the key of the paper's score in the task's results.
        measures: the metric in words.
        columns: what the task reads of a document.
    """

    name: str
    task: str
    file: str
    split: str
    metric: str
    measures: str
    columns: tuple[str, ...]

    @property
    def group(self) -> str:
        """In table 4 of the paper."""
        return next(group for group, names in GROUPS.items() if self.name in names)

    @property
    def local_task(self) -> str:
        """The task's name where it reads local files."""
        return f"{self.task}_local"

    def score(self, result: Mapping[str, Any], samples: int) -> float:
        """The score in the paper's units.

        Args:
            result: of the task, as lmms-eval returns it.
            samples: that were scored.
        """
        value = float(result[self.metric])
        if self.name == "MME-P":
            return value
        return 100 * value * (OCRBENCH_SIZE / samples if self.name == "OCRBench" else 1)


_ALL = (
    Benchmark(
        "GQA",
        "gqa",
        "gqa/gqa.yaml",
        "testdev",
        "exact_match,none",
        "exact match without case and punctuation",
        ("image", "question", "answer"),
    ),
    Benchmark(
        "MME-P",
        "mme",
        "mme/mme.yaml",
        "test",
        "mme_perception_score,none",
        "per category: accuracy plus share of images with both questions right; ten categories summed",
        ("question_id", "image", "question", "answer", "category"),
    ),
    Benchmark(
        "MMStar",
        "mmstar",
        "mmstar/mmstar.yaml",
        "val",
        "average,none",
        "accuracy of the letter, averaged over subcategories",
        ("index", "image", "question", "answer", "category", "l2_category"),
    ),
    Benchmark(
        "MMMU",
        "mmmu_val",
        "mmmu/mmmu_val.yaml",
        "validation",
        "mmmu_acc,none",
        "accuracy, letters and open answers by MMMU's own parser",
        ("id", "question", "options", "answer", "question_type", "image_1"),
    ),
    Benchmark(
        "SQA-I",
        "scienceqa_img",
        "scienceqa/scienceqa_img.yaml",
        "test",
        "exact_match,none",
        "accuracy of the letter",
        ("image", "question", "choices", "answer", "hint"),
    ),
    Benchmark(
        "AI2D",
        "ai2d",
        "ai2d/ai2d.yaml",
        "test",
        "exact_match,flexible-extract",
        "accuracy of the letter",
        ("image", "question", "options", "answer"),
    ),
    Benchmark(
        "ChartQA",
        "chartqa",
        "chartqa/chartqa.yaml",
        "test",
        "relaxed_overall,none",
        "relaxed accuracy: numbers within 5 %",
        ("type", "image", "question", "answer"),
    ),
    Benchmark(
        "DocVQA",
        "docvqa_val",
        "docvqa/docvqa_val.yaml",
        "validation",
        "anls,none",
        "ANLS: normalised edit similarity, 0 below one half",
        ("image", "question", "answers"),
    ),
    Benchmark(
        "TextVQA",
        "textvqa_val",
        "textvqa/textvqa_val.yaml",
        "validation",
        "exact_match,none",
        "soft accuracy against ten annotators",
        ("image", "question_id", "question", "answers"),
    ),
    Benchmark(
        "OCRBench",
        "ocrbench",
        "ocrbench/ocrbench.yaml",
        "test",
        "ocrbench_accuracy,none",
        "share of questions whose answer stands in the response",
        ("dataset", "image", "question", "question_type", "answer"),
    ),
    Benchmark(
        "RWQA",
        "realworldqa",
        "realworldqa/realworldqa.yaml",
        "test",
        "exact_match,none",
        "accuracy of the letter or the word",
        ("image", "question", "answer"),
    ),
    Benchmark(
        "CVBench-2D",
        "cv_bench_2d",
        "cv_bench/cv_bench_2d.yaml",
        "test",
        "cv_bench_acc,none",
        "accuracy of the letter",
        ("idx", "type", "task", "image", "choices", "answer", "prompt", "source"),
    ),
    Benchmark(
        "CVBench-3D",
        "cv_bench_3d",
        "cv_bench/cv_bench_3d.yaml",
        "test",
        "cv_bench_acc,none",
        "accuracy of the letter",
        ("idx", "type", "task", "image", "choices", "answer", "prompt", "source"),
    ),
)

BENCHMARKS: Registry[Benchmark] = Registry("benchmark", {benchmark.name: benchmark for benchmark in _ALL})
assert tuple(BENCHMARKS) == COLUMNS


def choose(names: str | Iterable[str]) -> list[Benchmark]:
    """Benchmarks by name.

    Args:
        names: "paper" for all 13; or names of the paper, groups of it, or tasks of lmms-eval, with commas between.

    Raises:
        ValueError: a name that is none of these.
    """
    names = names.split(",") if isinstance(names, str) else list(names)
    by_task = {benchmark.task: benchmark.name for benchmark in _ALL}
    chosen: list[str] = []
    for name in map(str.strip, names):
        chosen += COLUMNS if name == "paper" else GROUPS.get(name, (by_task.get(name, name),))
    return [BENCHMARKS[name] for name in dict.fromkeys(chosen)]


def write_local_tasks(benchmarks: Iterable[Benchmark], data: Path, folder: Path) -> None:
    """Writes the task files that make lmms-eval read local parquet files, and change nothing else of its tasks.

    Args:
        benchmarks: for which.
        data: folder of ``<task>.parquet``, each with the columns that its task reads.
        folder: for the task files; made if missing.

    Raises:
        FileNotFoundError: a parquet file is not there.
    """
    import lmms_eval.tasks

    tasks = Path(lmms_eval.tasks.__file__).parent
    files = {benchmark: (data / f"{benchmark.task}.parquet").resolve() for benchmark in benchmarks}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"no {', '.join(missing)}: expected one parquet file for each task")
    folder.mkdir(parents=True, exist_ok=True)
    for benchmark, file in files.items():
        overlay = {
            "include": str(tasks / benchmark.file),
            "task": benchmark.local_task,
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {benchmark.split: str(file)}, "cache_dir": str(folder / "cache")},
        }
        if benchmark.name == "GQA":
            overlay["process_docs"] = None  # it would fetch the pictures, which are in the file
        (folder / f"{benchmark.local_task}.yaml").write_text(json.dumps(overlay, indent=2))  # JSON is YAML
