"""Results as JSON, as a table and as a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from benchmarks.speed.measure import Result

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def write(path: Path, head: dict[str, Any], results: list[Result]) -> None:
    """The JSON file, and beside it a plot of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{name: value for name, value in asdict(result).items() if value is not None} for result in results]
    path.write_text(json.dumps({**head, "results": rows}, indent=1) + "\n", encoding="utf-8")
    _plot(path.with_suffix(".png"), results)


def show(results: list[Result]) -> None:
    """Prints the table."""
    table = Table("case", "candidate", "ms", "quartiles", "ratio", "quartiles", "peak MB")
    for result in results:
        if result.failure is not None:
            table.add_row(result.case, result.name, "-", result.failure, "", "", "")
            continue
        assert result.quartiles is not None
        assert result.ratio_quartiles is not None
        table.add_row(
            result.case,
            result.name,
            f"{result.milliseconds:.3f}",
            "{:.3f} {:.3f}".format(*result.quartiles),
            f"{result.ratio:.3f}",
            "{:.3f} {:.3f}".format(*result.ratio_quartiles),
            f"{(result.peak_bytes or 0) / 1e6:.2f}",
        )
    Console(width=150).print(table)


def _plot(path: Path, results: list[Result]) -> None:
    """Median times by case, a line for each candidate, on a logarithmic axis."""
    timed = [result for result in results if result.milliseconds is not None]
    cases = list(dict.fromkeys(result.case for result in timed))
    figure, axes = plt.subplots(figsize=(max(6, 1.1 * len(cases) + 3), 4.5), layout="constrained")
    for name in dict.fromkeys(result.name for result in timed):
        points = [(cases.index(result.case), result.milliseconds) for result in timed if result.name == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xticks(range(len(cases)), cases, rotation=30, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel("median time in ms")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
