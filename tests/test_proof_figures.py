"""The figures of the proof's report show the lines, and no more than there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.proof import report
from benchmarks.proof.figures import curves_figure, density_figure, forgetting_figure, pareto_figure
from benchmarks.proof.levels import LEVELS
from benchmarks.proof.results import Results
from tests.proof_lines import LEVEL, SCORES, spec_of, write_lines, write_runs

FIGURES = (pareto_figure, curves_figure, density_figure, forgetting_figure)


def test_every_ratio_has_a_panel(tmp_path: Path) -> None:
    found = Results(write_lines(tmp_path), LEVEL)
    for run in found.by_arm["pooled 1/9 + VR"]:
        run["inside"]["forgetting"]["remembered"] = [0.7] * 9
        run["inside"]["density"] = [0.2] * 8
    panels = forgetting_figure(found).axes
    assert [axes.get_title(loc="left") for axes in panels] == [f"What tokens know, 1/{ratio}" for ratio in (4, 9, 16)]
    remembered = [
        [series.get_ydata()[0] for series in axes.lines if series.get_label() == "with blocks"] for axes in panels
    ]
    assert remembered == [[pytest.approx(0.9)], [pytest.approx(0.7)], [pytest.approx(0.9)]]
    without, ours = density_figure(found).axes
    assert [series.get_ydata()[0] for series in without.lines] == [1.0] * 5  # four arms and an even share
    assert [series.get_ydata()[0] for series in ours.lines] == [1.0, pytest.approx(0.2), 1.0, 1.0]


def test_a_curve_is_the_mean_of_its_seeds_in_their_span(tmp_path: Path) -> None:
    found = Results(write_lines(tmp_path), LEVEL)
    for run, accuracy in zip(found.by_arm["pooled 1/4"], (0.1, 0.4), strict=True):
        run["curve"] = {"steps": [5, 9], "validation": [dict.fromkeys(run["test"], value) for value in (0, accuracy)]}
    (axes,) = curves_figure(found).axes
    (series,) = [series for series in axes.lines if series.get_label() == "pooled 1/4"]
    assert list(series.get_xdata()) == [5, 9]
    assert list(series.get_ydata()) == pytest.approx([0, 25])
    spans = [span.get_paths()[0].get_extents().extents for span in axes.collections]
    assert any(extents == pytest.approx([5, 0, 9, 40]) for extents in spans)


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize("arm", ["no compression", "pooled 1/4"])
def test_a_figure_is_drawn_of_what_has_ended(tmp_path: Path, arm: str, draw: object) -> None:
    file = tmp_path / "few.jsonl"
    write_runs(file, LEVEL, [spec_of(arm)], [0], write_lines(tmp_path))
    assert callable(draw)
    draw(Results(file, LEVEL)).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_the_papers_geometry_has_figures_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path)
    monkeypatch.setattr(report, "CPU", LEVEL)
    monkeypatch.setitem(LEVELS, LEVEL.name, LEVEL)
    wide = replace(LEVEL, name="wide", check_every=7)
    monkeypatch.setattr(report, "GPU", wide)
    write_runs(tmp_path / "proof_wide.jsonl", wide, [spec_of(name) for name in SCORES], [0], path)
    page = tmp_path / "proof.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.main(["--level", LEVEL.name, "--results", str(path), "--page", str(page)])
    assert "## At the paper's geometry" in page.read_text()
    assert {"proof_gpu_density.png", "proof_gpu_forgetting.png"} <= {p.name for p in (tmp_path / "images").iterdir()}
