"""The rendered benchmark's rows, scored by the official tasks of the benchmarks that they mirror."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation import evaluate
from benchmarks.local_tasks import write_parquet
from benchmarks.official_tasks import BENCHMARKS, choose
from benchmarks.paper_tables import COLUMNS, per_cent
from benchmarks.reference_models import Blind, Oracle
from vision_remember import synth

_PAPERS_NAMES = {"ScienceQA": "SQA-I", "RealWorldQA": "RWQA"}


def mirrored(task: str) -> str:
    """The benchmark that a rendered task stands for, as the paper's tables call it."""
    name: str = synth.TASKS[task].mirrors
    return _PAPERS_NAMES.get(name, name)


MIRRORED = [name for name in COLUMNS if name in map(mirrored, synth.TASKS)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("synth")
    rows: dict[str, list[dict[str, Any]]] = {}
    for task in synth.TASKS:
        rows.setdefault(mirrored(task), []).extend(synth.rows(task, 4))
    for name, made in rows.items():
        write_parquet(made, folder / f"{BENCHMARKS[name].task}.parquet")
    models = {"oracle": Oracle(), "blind": Blind()}
    return {
        kind: evaluate(model, choose(MIRRORED), folder=folder / kind, data=folder) for kind, model in models.items()
    }


@pytest.mark.parametrize("name", MIRRORED)
def test_official_metrics_score_the_rendered_rows(reports: dict[str, Any], name: str) -> None:
    oracle, blind = (reports[kind]["benchmarks"][name] for kind in ("oracle", "blind"))
    if name == "MME-P":  # a sum over the categories that are there
        categories = round(oracle["score"] / 200)
        assert oracle["score"] == 200 * categories > 0
        assert blind["score"] < 0.9 * oracle["score"]
    else:
        assert per_cent(name, oracle["score"]) == pytest.approx(100, abs=1e-3)
        assert blind["score"] < 90
