"""Writes the report: one HTML file that needs no other, the numbers as JSON and the figures as PNG."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vision_remember.adapters.report_page import template

from .figures import COLOURS, STYLE, accuracy_figure, curves_figure, look_figure, reading_figure
from .questions import KINDS
from .run import VR_ARM, Outcome

DPI = 150
CHARACTERS = KINDS[0].name


@dataclass(frozen=True)
class Claim:
    """One thing the demo sets out to show, and whether this run shows it in every seed."""

    text: str
    found: str
    holds: bool


def write_report(outcome: Outcome, directory: Path) -> Path:
    """Writes report.html, results.json and the figures into a directory; returns the report's path."""
    directory.mkdir(parents=True, exist_ok=True)
    results = outcome.results
    images = {}
    for name, png in _figures(outcome).items():
        (directory / f"{name}.png").write_bytes(png)
        images[name] = "data:image/png;base64," + base64.b64encode(png).decode()
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    html = template(Path(__file__).with_name("report.html.j2")).render(
        results=results,
        kinds=KINDS,
        colours=COLOURS,
        images=images,
        claims=claims(results),
        headline=mean_accuracy(results, VR_ARM, CHARACTERS),
        baseline=mean_accuracy(results, "pooled", CHARACTERS),
        mean_accuracy=lambda arm, kind: mean_accuracy(results, arm, kind),
        spread=lambda arm, kind: spread(results, arm, kind),
    )
    path = directory / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def _accuracies(results: dict[str, Any], arm: str, kind: str) -> list[float]:
    return [100 * seed["accuracy"][kind] for seed in results["arms"][arm]["seeds"]]


def mean_accuracy(results: dict[str, Any], arm: str, kind: str) -> float:
    """Mean test accuracy over the seeds, in %."""
    values = _accuracies(results, arm, kind)
    return sum(values) / len(values)


def spread(results: dict[str, Any], arm: str, kind: str) -> float:
    """Largest distance of a seed from the mean, in points."""
    mean = mean_accuracy(results, arm, kind)
    return max(abs(value - mean) for value in _accuracies(results, arm, kind))


def claims(results: dict[str, Any]) -> list[Claim]:
    """What the demo sets out to show about characters, checked in each seed on its own."""
    pooled, restored, control = (_accuracies(results, arm, CHARACTERS) for arm in ("pooled", VR_ARM, "pooled + MLP"))
    gaps = [abs(a - b) for a, b in zip(control, pooled, strict=True)]
    return [
        Claim("Pooling forgets: at most 40 % of characters", _list(pooled, "%"), max(pooled) <= 40),
        Claim("Vision Remember reads them back: at least 90 %", _list(restored, "%"), min(restored) >= 90),
        Claim(
            "Parameters alone do not: the MLP stays within 5 points of pooled", _list(gaps, "points"), max(gaps) <= 5
        ),
    ]


def _list(values: list[float], unit: str) -> str:
    return ", ".join(f"{value:.1f}" for value in values) + f" {unit}"


def _figures(outcome: Outcome) -> dict[str, bytes]:
    """The figures by name, as PNG files."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figures = {
            "accuracy": accuracy_figure(outcome.results),
            "curves": curves_figure(outcome.results),
            "reading": reading_figure(outcome.page, outcome.readings),
            "look": look_figure(outcome.page, outcome.look),
        }
        return {name: _png(figure) for name, figure in figures.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
