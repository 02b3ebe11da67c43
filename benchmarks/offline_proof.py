"""Runs the 13 official tasks on rendered local files, with a model that knows every answer and one that sees nothing.

``python -m benchmarks.offline_proof --folder proof`` needs lmms-eval, and neither weights nor a network.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.evaluation import evaluate
from benchmarks.local_tasks import LOCAL_TASKS, write_local_data
from benchmarks.official_tasks import BENCHMARKS
from benchmarks.paper_tables import MME_POINTS_PER_PERCENT


def full_marks(name: str) -> float:
    """The highest score of a benchmark, in the paper's units."""
    return 100.0 * (MME_POINTS_PER_PERCENT if name == "MME-P" else 1)


def prove(folder: Path) -> dict[str, dict[str, Any]]:
    """Result files' contents by model, "oracle" and "blind".

    Args:
        folder: for the rendered files and what the tasks write.
    """
    from benchmarks.reference_models import Blind, Oracle

    write_local_data(folder / "data")
    reports = {}
    for name, model in (("oracle", Oracle()), ("blind", Blind())):
        report = evaluate(model, BENCHMARKS.values(), folder=folder / name, data=folder / "data")
        assert report is not None
        reports[name] = report
    return reports


def main(argv: Sequence[str] | None = None) -> int:
    """The command; fails if the oracle misses a mark or the blind model is off chance."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline_proof", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--folder", type=Path, default=Path("offline_proof"), help="(default: %(default)s)")
    folder = parser.parse_args(argv).folder
    os.environ["HF_HUB_OFFLINE"] = "1"
    reports = prove(folder)
    print(f"{'benchmark':<12} {'oracle':>8} {'full':>8} {'blind':>8} {'chance':>8}")
    right = True
    for name in BENCHMARKS:
        oracle, blind = (reports[model]["benchmarks"][name]["score"] for model in ("oracle", "blind"))
        chance = LOCAL_TASKS[name].chance
        print(f"{name:<12} {oracle:>8.1f} {full_marks(name):>8.1f} {blind:>8.1f} {chance:>8.1f}")
        right &= oracle == full_marks(name) and abs(blind - chance) < 1e-6
    oracle, blind = (reports[model]["average"]["value"] for model in ("oracle", "blind"))
    print(f"{'average':<12} {oracle:>8.1f} {'':>8} {blind:>8.1f}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
