"""What a result file of an evaluation holds, and how two of them are compared.

Scores without their circumstances cannot be repeated: the file names harness and libraries by version, prompt and
generation arguments of each task, vision tokens, dtype and attention implementation, and the scores of single samples.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.official_tasks import Benchmark
from benchmarks.paper_tables import average, group_averages

FORMAT = 1

_LIBRARIES = ("vision-remember", "torch", "transformers", "tokenizers", "datasets", "pillow", "numpy")

# what may differ between two runs that are compared: it is what the comparison is about, or says where they ran
_MAY_DIFFER = ("pretrained", "adapter", "vision_remember", "enabled", "device", "batch_size")


def build(
    results: Mapping[str, Any],
    tasks: Mapping[str, Benchmark],
    settings: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of a result file, ready for JSON.

    Args:
        results: of lmms-eval's ``simple_evaluate``, with samples.
        tasks: the benchmarks, by the names of the tasks that ran.
        settings: of the model.
        records: prompt, arguments and token counts of each task.
    """
    rows = {benchmark.name: _row(benchmark, task, results, records.get(task, {})) for task, benchmark in tasks.items()}
    scores = {name: row["score"] for name, row in rows.items()}
    report = {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "harness": {"name": "lmms-eval", "version": version("lmms-eval")},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
        "settings": dict(settings),
        "seeds": {key: value for key, value in results["config"].items() if key.endswith("seed")},
        "limit": results["config"]["limit"],
        "benchmarks": rows,
        "average": {"value": average(scores), "of": len(scores), "units": "per cent, MME-P divided by 20"},
        "groups": group_averages(scores),
    }
    # as it will be read again: no tuples, no NumPy
    return dict(json.loads(json.dumps(report, default=str)))


def _row(benchmark: Benchmark, task: str, results: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    scored = [(sample, score) for sample in samples if (score := sample_score(benchmark, sample)) is not None]
    if not scored:
        raise ValueError(f"{task}: no sample has the metric {benchmark.metric!r} that the paper's {benchmark.name} is")
    return {
        "task": task,
        "task_version": results["versions"].get(task),
        "metric": benchmark.metric,
        "group": benchmark.group,
        "score": benchmark.score(results["results"][task], len(scored)),
        "samples": len(scored),
        "first_question": scored[0][0]["arguments"][0],
        **record,
        "documents": [_fingerprint(sample["doc"]) for sample, _ in scored],
        "answers": [sample["filtered_resps"][0] for sample, _ in scored],
        "sample_scores": [score for _, score in scored],
    }


def sample_score(benchmark: Benchmark, sample: Mapping[str, Any]) -> float | None:
    """One sample's part of the score, from 0 to 1; None where it is no part (MME's other half).

    MME's is the plain accuracy: its second half, both questions of a picture, belongs to no single sample.
    """
    value = sample.get(benchmark.metric.split(",")[0])
    if value is None or isinstance(value, (bool, int, float)):
        return None if value is None else float(value)
    if benchmark.name == "MMMU":
        from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

        return float(evaluate_mmmu([value])[1]["acc"])
    return float(value["score"] if "score" in value else value["is_correct"])


def compare(report: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """How a run differs from another on the same documents.

    Args:
        report: content of a result file.
        baseline: of the other.

    Returns:
        For each benchmark of both: difference in points of per cent of the single samples, 95 % interval and p-value of
        a paired t-test (None where all differences are equal); and the settings that differ and should not.

    Raises:
        ValueError: no common benchmark, or other documents in one.
    """
    from scipy.stats import ttest_rel

    common = [name for name in report["benchmarks"] if name in baseline["benchmarks"]]
    if not common:
        raise ValueError(
            f"the baseline has {', '.join(baseline['benchmarks'])}, the run {', '.join(report['benchmarks'])}"
        )
    rows = {}
    for name in common:
        ours, theirs = report["benchmarks"][name], baseline["benchmarks"][name]
        if ours["documents"] != theirs["documents"]:
            raise ValueError(
                f"{name}: the baseline's {theirs['samples']} documents are not the {ours['samples']} of this run; "
                "use the same data and limit"
            )
        pairs = ours["sample_scores"], theirs["sample_scores"]
        differences = {a - b for a, b in zip(*pairs, strict=True)}
        test = ttest_rel(*pairs) if len(differences) > 1 else None
        interval = None if test is None else test.confidence_interval(0.95)
        rows[name] = {
            "score": ours["score"],
            "baseline_score": theirs["score"],
            "samples": ours["samples"],
            "sample_difference": 100 * (math.fsum(pairs[0]) - math.fsum(pairs[1])) / ours["samples"],
            "interval": None if interval is None else [100 * float(interval.low), 100 * float(interval.high)],
            "p_value": None if test is None else float(test.pvalue),
        }
    scores = ({name: row[key] for name, row in rows.items()} for key in ("score", "baseline_score"))
    ours_mean, theirs_mean = map(average, scores)
    return {
        "benchmarks": rows,
        "average_difference": ours_mean - theirs_mean,
        "also_differs": _other_differences(report, baseline, common),
    }


def write(report: Mapping[str, Any], file: Path) -> None:
    """Writes a result file: whole, or not at all."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    part = file.with_name(file.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(file)


def read(file: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none of this format.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{file}: expected a result file, which is JSON: {error}") from error
    found = report.get("format") if isinstance(report, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file}: expected a result file with format {FORMAT}, got {found!r}")
    return dict(report)


def _other_differences(report: Mapping[str, Any], baseline: Mapping[str, Any], common: Sequence[str]) -> list[str]:
    """Names of circumstances that differ between the two runs, beside what is compared."""
    pairs = {"harness": (report["harness"], baseline["harness"])}
    for part in ("versions", "settings", "seeds"):
        names = {*report[part], *baseline[part]} - set(_MAY_DIFFER)
        pairs |= {f"{part}.{name}": (report[part].get(name), baseline[part].get(name)) for name in names}
    for name in common:
        rows = report["benchmarks"][name], baseline["benchmarks"][name]
        for key in ("metric", "task_version", "first_question", "prompt", "generation", "vision_tokens"):
            pairs[f"{name}.{key}"] = (rows[0].get(key), rows[1].get(key))
    return sorted(name for name, (ours, theirs) in pairs.items() if ours != theirs)


def _fingerprint(document: Mapping[str, Any]) -> str:
    """Of a document without its pictures."""
    text = json.dumps(document, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
