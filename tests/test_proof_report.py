"""The proof's report: what it says of a results file whose numbers are known."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from benchmarks.proof import report
from benchmarks.proof.claims import CLAIMS, DETAIL
from benchmarks.proof.levels import LEVELS
from benchmarks.proof.longer import longer_rows
from benchmarks.proof.results import Results
from benchmarks.proof.runner import Job, read_lines, stages_file
from benchmarks.proof.suites import SUITES
from benchmarks.proof.tables import claim_rows, paper_scores, pruned_rows, recovery_rows, stage_rows, suite_table
from tests.proof_lines import (
    LEVEL,
    SCORES,
    SEEDS,
    TASKS,
    all_of,
    cells,
    detail_of,
    line,
    row_of,
    spec_of,
    write_lines,
    write_runs,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_lines(tmp_path)


@pytest.fixture
def results(path: Path) -> Results:
    return Results(path, LEVEL)


def test_a_table_has_the_mean_of_the_lines_and_links_to_them(results: Results) -> None:
    rows = suite_table(results, "table5a")
    assert len(rows) == 2 + len(SUITES["table5a"])
    found = row_of(rows, "pooled 1/4 + VR")
    means = [detail_of("pooled 1/4 + VR", seed) for seed in SEEDS]
    low, high = stats.t.interval(0.95, 1, statistics.fmean(means), stats.sem(means))
    assert found[DETAIL] == f"{(low + high) / 2:.1f} ± {(high - low) / 2:.1f}"
    assert (found["tokens"], found["added parameters"], found["prefill"]) == ("36", "1,234,567", "1.25")
    assert found["paper: mean"] == "47.1"
    for seed in SEEDS:
        number = results.number[Job(spec_of("pooled 1/4 + VR"), seed).key(LEVEL)]
        assert f"[{seed}]({results.path}#L{number})" in found["lines"]
        assert json.loads(results.path.read_text().splitlines()[number - 1])["seed"] == seed


def test_the_paper_stands_beside_the_arms_that_it_has() -> None:
    assert paper_scores("table4b", "global attention") == ("49.5, 41.8, 20.2, 43.4", "36.7")
    assert paper_scores("table4c", "1, 4, 7") == ("57.6, 42.5, 44.2, 45.2", "46.0")
    assert paper_scores("table2", "average pool + VR") == ("58.6, 43.4, 45.7, 46.2", "47.1")
    assert paper_scores("table2", "deformable") == ("58.3, 43.1, 36.4, 46.1", "44.1")
    assert paper_scores("table5a", "no compression") == ("–", "47.5")
    assert paper_scores("table2", "TokenPacker") == paper_scores("controls", "pooled") == ("–", "–")


def test_what_comes_back_is_reported_with_its_price(results: Results) -> None:
    found = row_of(recovery_rows(results), "1/4")
    shares = []
    for seed in SEEDS:
        low, mine, high = (detail_of(name, seed) for name in ("pooled 1/4", "pooled 1/4 + VR", "no compression"))
        shares.append(100 * (mine - low) / (high - low))
    assert found["won back, %"].split(" ± ")[0] == f"{statistics.fmean(shares):.1f}"
    assert (found["prefill, to pooled"], found["absorbed"]) == ("1.25", "1.12")
    # to what is pooled at the same ratio, which has a time of its own
    assert row_of(recovery_rows(results), "1/9")["prefill, to pooled"] == "2.50"


def test_claims_are_decided_by_the_lines(results: Results) -> None:
    rows = claim_rows(results)
    known = results.by_arm
    assert len(rows) == 2 + sum(bool(known[claim.better]) and bool(known[claim.worse]) for claim in CLAIMS)
    assert len(rows) >= len(CLAIMS)  # all but the two about an arm that this search did not choose
    better, worse = (all_of(name) for name in ("pooled 1/4 + VR", "pooled 1/4"))
    expected = stats.ttest_rel(better, worse)
    found = row_of(rows, "Vision Remember wins it back")
    assert found["here"] == "holds"
    low, high = expected.confidence_interval(0.95)
    assert found["difference, points"] == f"{(low + high) / 2:+.1f} ± {(high - low) / 2:.1f}"
    assert found["p"] == f"{expected.pvalue:.2g}"
    assert row_of(rows, "It helps PixelShuffle")["here"] == "undecided"


def test_a_claim_that_fails_is_reported_as_failed(path: Path) -> None:
    lines = read_lines(path)
    keys = {Job(spec_of("pooled 1/4 + VR"), seed).key(LEVEL) for seed in SEEDS}
    for one in lines:
        if one["key"] in keys:
            one["test"] = {task: value / (3 + 0.02 * one["seed"]) for task, value in one["test"].items()}
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = row_of(claim_rows(Results(path, LEVEL)), "It reads text and charts better")
    assert found["here"] == "the opposite holds"
    assert found["difference, points"].startswith("-")


def test_pruners_stand_beside_the_arm_that_they_prune(results: Results) -> None:
    rows = pruned_rows(results)
    assert [cells(row)[0] for row in rows[2:]] == ["none", "FastV 1/4"]
    assert (cells(rows[2])[1:3], cells(rows[3])[1:3]) == (["144", "1.00"], ["63.0", "1.50"])
    means = [detail_of("no compression", seed) for seed in SEEDS]
    assert row_of(rows, "FastV 1/4")[DETAIL].startswith(f"{statistics.fmean(means):.1f}")


def test_a_ratio_that_no_decoder_reads_is_named(path: Path) -> None:
    level = replace(LEVEL, reads_enough=0.95)
    assert [cells(row)[-1] for row in stage_rows(Results(path, level))[2:]] == ["left out: below 95 %"] * 3
    assert [cells(row)[-1] for row in stage_rows(Results(path, LEVEL))[2:]] == ["run"] * 3


def test_more_steps_stand_beside_the_same_seeds(path: Path, tmp_path: Path) -> None:
    level = replace(LEVEL, name="longer", arm=replace(LEVEL.arm, steps=7))
    more = tmp_path / "longer.jsonl"
    arms = SUITES["patience"]
    both = spec_of("no compression")
    lines = [{**line(arm, 1, 0.8), "key": Job(arm, 1).key(level)} for arm in arms[:-1]]
    lines.append({**line(both, 0, 0.8), "key": Job(both, 0).key(level)})
    more.write_text("".join(json.dumps(one) + "\n" for one in lines))
    stages_file(more).write_text(stages_file(path).read_text())
    longer = Results(more, level)
    few = Results(path, LEVEL)
    few.keep_seeds_of(longer)
    rows = longer_rows(few, longer)
    assert [cells(row)[0] for row in rows[2:]] == [arm.name for arm in arms[:-1]]
    row = row_of(rows, "pooled 1/4")
    of_few = {name: Results(path, LEVEL).by_arm[name] for name in ("pooled 1/4", "no compression")}
    assert row[f"{DETAIL}, 3 steps"] == f"{detail_of('pooled 1/4', 1):.1f}"
    assert row["mean, 3 steps"] == f"{100 * statistics.fmean(of_few['pooled 1/4'][1]['test'].values()):.1f}"
    assert [one["seed"] for one in few.by_arm["no compression"]] == [0, 1]
    assert [one["seed"] for one in few.by_arm["pooled 1/4"]] == [1]
    assert float(row[f"{DETAIL}, 7 steps"]) == pytest.approx(80, abs=2.3)
    assert float(row["mean, 7 steps"]) == pytest.approx(longer.mean("pooled 1/4").value, abs=0.05)
    assert row["won back, %, 3 steps"] == "–"
    none, bag, mine = (detail_of(name, 1) for name in ("no compression", "pooled 1/4", "pooled 1/4 + VR"))
    share = row_of(rows, "pooled 1/4 + VR")["won back, %, 3 steps"]
    assert share == f"{100 * (mine - bag) / (none - bag):.1f}"
    number = 1 + [arm.name for arm in arms].index("pooled 1/4")
    assert f"longer.jsonl#L{number})" in row["lines, 7 steps"]
    assert "lines.jsonl#L" in row["lines, 3 steps"]
    assert "[0]" not in row["lines, 3 steps"]
    page = report.written_part(Results(path, LEVEL), longer)
    said = f"Level `longer`, seeds [0, 1], {len(lines)} lines; torch 0.0."
    assert "\n\n".join(["## With 7 steps", said, "\n".join(rows)]) in page


@pytest.mark.parametrize("whole", [True, False])
def test_the_papers_geometry_has_tables_of_what_has_ended(path: Path, tmp_path: Path, whole: bool) -> None:
    """Without an uncompressed arm nothing is said of shares of the loss; all else is."""
    level = replace(LEVEL, name="wider", check_every=7)
    file = tmp_path / "wider.jsonl"
    arms = [spec_of(name) for name in SCORES if whole or name != "no compression"]
    write_runs(file, level, arms, SEEDS[:2], path)
    wider = Results(file, level)
    page = report.written_part(Results(path, LEVEL), wider=wider)
    part = page.split("## At the paper's geometry\n\n")[1]
    assert part.startswith(f"Level `wider`, seeds [0, 1], {2 * len(arms)} lines; torch 0.0.\n\nIn the last steps ")
    assert "the encoder named 98.0 % of" in part
    rows = [row for row in part.splitlines() if row.startswith("| ")]
    run = {arm.name for suite in SUITES.values() for arm in suite if arm.recipe() in [one.recipe() for one in arms]}
    claims = [claim for claim in CLAIMS if {claim.better, claim.worse} <= run]
    assert [cells(row)[0] for row in rows if "wider.jsonl#L" in row and " − " in row] == [c.text for c in claims]
    assert f"| pooled 1/4 + VR | 36 | 1,234,567 | – | {wider.mean('pooled 1/4 + VR', 'General')} |" in part
    assert ("won back" in part) == whole
    assert ("| FastV 1/4 |" in part) == whole
    assert "| pooled + VR | 36 |" in part  # of the causes
    assert all(f"| `{task}` |" in part for task in TASKS)


def test_the_command_writes_page_and_figures(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEVELS, LEVEL.name, LEVEL)
    page = tmp_path / "proof.md"
    page.write_text(f"above\n{report.BEGIN}\nwhat stood here\n{report.END}\nbelow\n")
    report.main(["--level", LEVEL.name, "--results", str(path), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "what stood here" not in text
    assert all(f"## {title}" in text for title in report.TITLES.values())
    pictures = {picture.name for picture in (tmp_path / "images").iterdir() if picture.stat().st_size > 5000}
    assert pictures == {"proof_pareto.png", "proof_curves.png", "proof_density.png", "proof_forgetting.png"}


def test_a_file_without_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lines\.jsonl has no lines: no run has ended yet"):
        Results(tmp_path / "lines.jsonl", LEVEL)


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        report.updated("nothing here", "part")
