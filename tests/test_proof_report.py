"""The proof's report: what it says of a results file whose numbers are known."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks.proof import report
from benchmarks.proof.arms import ArmSpec
from benchmarks.proof.claims import CLAIMS, DETAIL
from benchmarks.proof.levels import LEVELS, TINY
from benchmarks.proof.longer import longer_rows
from benchmarks.proof.pages import task_groups, task_names
from benchmarks.proof.results import Results
from benchmarks.proof.runner import (
    Job,
    arms_of,
    choice_arms,
    chosen_arms,
    read_lines,
    stages_file,
    suite_arms,
    tuned_arms,
    tuning_arms,
    validation_mean,
)
from benchmarks.proof.suites import (
    INTERACTION_NAMES,
    POOLED,
    REMEMBER,
    SALIENCIES,
    SUITES,
    TUNING_FACTORS,
    TUNING_SEED,
    rate_arms,
    saliency_arms,
    searched_arms,
)
from benchmarks.proof.tables import (
    claim_rows,
    paper_scores,
    pruned_rows,
    recovery_rows,
    saliency_name,
    search_rows,
    stage_rows,
    suite_table,
    tuning_rows,
)
from benchmarks.proof.times import absorbed_name, times_file

LEVEL = replace(TINY, name="fixture")
TASKS = task_names(LEVEL)
GROUPS = task_groups(TASKS)
RATES = [factor * LEVEL.arm.lr for factor in TUNING_FACTORS]
BEST = {
    "global": ("no saliency", RATES[0]),
    "deformable": ("1 + sigmoid", RATES[2]),
    "sela": ("sigmoid", RATES[1]),
}
"""The saliency and the rate that each interaction does best with."""
SEEDS = (0, 1)
SEARCH_WINNER = "1/4: two query layers"
SCORES = {"no compression": 0.9, "pooled 1/4": 0.4, "pooled 1/4 + VR": 0.85}
"""On OCR & Chart, as seed 0 has them; every other arm has 0.3."""


def tried() -> list[tuple[ArmSpec, float]]:
    """What is tried for table 4b, each run once, with its validation accuracy."""
    found: dict[str, tuple[ArmSpec, float]] = {}
    for name, (saliency, best) in BEST.items():
        arms = saliency_arms(name)
        chosen = arms[list(SALIENCIES).index(saliency)]
        at_rates = zip(rate_arms(chosen, LEVEL), RATES, strict=True)
        runs = [(arm, 0.55 if arm == chosen else 0.5) for arm in arms]
        runs += [(arm, 0.6 if rate == best else 0.52) for arm, rate in at_rates if arm != chosen]
        if best == LEVEL.arm.lr:
            runs = [(arm, 0.6 if arm == chosen else score) for arm, score in runs]
        found |= {Job(arm, TUNING_SEED).key(LEVEL): (arm, score) for arm, score in runs}
    return list(found.values())


def line(arm: ArmSpec, seed: int, score: float) -> dict[str, Any]:
    # every arm goes up and down over tasks and seeds in a way of its own, or a paired test would have nothing to weigh
    wave = len(json.dumps(arm.recipe()))
    score += 0.001 * ((seed + 1) * wave % 11)
    test = {task: round(score + 0.002 * (i * wave % 7), 4) for i, task in enumerate(TASKS)}
    pruned = {"none": {"test": test}, "FastV 1/4": {"test": test, "tokens": 63.0}}
    inside = {"density": [1.0] * 8, "forgetting": {"remembered": [0.9] * 9, "plain": [0.5] * 9, "commonest": 0.3}}
    return {
        "key": Job(arm, seed).key(LEVEL),
        "arm": arm.name,
        "seed": seed,
        "tokens": 144 // arm.ratio,
        "parameters": {"projector": 10, "blocks": 1234567, "decoder": 30},
        **({"pruned": pruned} if arm.projector is None else {}),
        "curve": {"steps": [1], "losses": [1.0], "validation": [test]},
        "test": test,
        "inside": inside,
        "versions": {"torch": "0.0"},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with every run of every suite, the tuning runs first, as the runner writes them."""
    lines = [line(arm, TUNING_SEED, 0.7 if arm.name == SEARCH_WINNER else 0.6) for arm in searched_arms(4)]
    lines += [line(arm, TUNING_SEED, score) for arm, score in tried()]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    reads = {side: {"1": 0.99, side: 0.9} for side in ("2", "3", "4")}
    stages_file(file).write_text(json.dumps({"encoder": {"written_cells": 0.98}, "reads": reads, "curves": {}}))
    times = {
        arm.name: {"prefill": [1.0, 1.25 if arm.layers else 1.0, 1.5], "forward": [0.5, 1.0, 2.0]}
        for arm in [POOLED, *(arm for arms in SUITES.values() for arm in arms)]
    }
    times["pooled 1/9"]["prefill"] = [0.4, 0.5, 0.6]
    absorbed = {absorbed_name("pooled 1/4 + VR"): {"prefill": [1.0, 1.125, 1.5]}}
    times_file(file).write_text(json.dumps({"times": {**times, **absorbed, "FastV 1/4": {"forward": [1.4, 1.5, 1.6]}}}))
    for arm in arms_of(SUITES, LEVEL, file):
        # an arm that two tables share is found by what it is, not by what it is called
        known = next((name for name in SCORES if _spec(name).recipe() == arm.recipe()), None)
        lines += [line(arm, seed, SCORES[known] if known else 0.3) for seed in SEEDS]
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return file


def _spec(name: str) -> ArmSpec:
    return next(arm for arm in SUITES["table5a"] if arm.name == name)


def all_of(name: str) -> list[float]:
    """The arm's mean accuracy over tasks, in per cent, by seed."""
    return [100 * statistics.fmean(line(_spec(name), seed, SCORES[name])["test"].values()) for seed in SEEDS]


def detail_of(name: str, seed: int) -> float:
    """The arm's mean on OCR & Chart, in per cent."""
    test = line(_spec(name), seed, SCORES[name])["test"]
    return 100 * statistics.fmean(test[task] for task in TASKS if GROUPS[task] == DETAIL)


@pytest.fixture
def results(path: Path) -> Results:
    return Results(path, LEVEL)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def row_of(rows: list[str], first: str) -> dict[str, str]:
    found = [cells(row) for row in rows if cells(row)[0] == first]
    assert len(found) == 1, f"{first!r} stands {len(found)} times"
    return dict(zip(cells(rows[0]), found[0], strict=True))


def test_each_interaction_takes_the_saliency_and_the_rate_that_validation_prefers(path: Path) -> None:
    chosen = tuned_arms(LEVEL, path)
    assert chosen is not None
    assert [arm.name for arm in chosen] == [INTERACTION_NAMES[name] for name in BEST]
    by_name = dict(zip(BEST, chosen, strict=True))
    assert {name: arm.lr for name, arm in by_name.items()} == {"global": RATES[0], "deformable": RATES[2], "sela": None}
    assert {name: saliency_name(arm) for name, arm in by_name.items()} == {name: best[0] for name, best in BEST.items()}
    # the rate that every other table uses goes unsaid: this SELA is the arm of the others
    assert by_name["sela"].recipe() == REMEMBER.recipe()
    rows = suite_table(Results(path, LEVEL), "table4b")
    said = [f"{INTERACTION_NAMES[name]} ({saliency}, rate {rate:g})" for name, (saliency, rate) in BEST.items()]
    assert [cells(row)[0] for row in rows[2:]] == said


def test_a_better_default_is_what_validation_prefers(path: Path) -> None:
    single = next(arm.name for arm in searched_arms(4) if len(arm.layers) == 1)
    assert [arm.name for arm in chosen_arms(LEVEL, path)] == [SEARCH_WINNER, single]
    names = [arm.name for arm in suite_arms("search", LEVEL, path)]
    assert names[-1] == SEARCH_WINNER
    assert names.count(single) == 1  # it is run in any case
    rows = search_rows(Results(path, LEVEL))
    assert [cells(row)[0] for row in rows[2:]] == [arm.name for arm in searched_arms(4)]
    lines = read_lines(path)
    for one in lines:
        if one["arm"] == SEARCH_WINNER:
            one["parameters"]["blocks"] += 1
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    best, best_of_no_more, best_single = chosen_arms(LEVEL, path)
    assert (best.name, best_single.name) == (SEARCH_WINNER, single)
    assert best_of_no_more.name != SEARCH_WINNER


def test_the_group_that_judges_a_default_does_not_choose_it(path: Path) -> None:
    """An arm that reads OCR & Chart alone is not chosen; one that reads all else is."""
    lines = read_lines(path)
    bad, good = (arm.name for arm in searched_arms(4)[3:5])
    for one in lines:
        for task, group in GROUPS.items() if one["seed"] == TUNING_SEED else ():
            if one["arm"] in (bad, good):
                one["curve"]["validation"][-1][task] = float((group == DETAIL) == (one["arm"] == bad))
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    names = [arm.name for arm in chosen_arms(LEVEL, path)]
    assert good in names
    assert bad not in names


def test_every_interaction_is_tuned_alike(path: Path) -> None:
    """Each saliency at the level's rate, then the best of them at all rates; they differ in nothing else."""
    for name in BEST:
        arms = tuning_arms(name, LEVEL, path)
        assert [saliency_name(arm) for arm in arms[:3]] == list(SALIENCIES)
        # the level's own rate goes unsaid
        assert [arm.lr for arm in arms] == [None, None, None, *(rate for rate in RATES if rate != LEVEL.arm.lr)]
        assert {saliency_name(arm) for arm in arms[3:]} == {BEST[name][0]}
        fields = {json.dumps({k: v for k, v in arm.overrides.items() if "saliency" not in k}) for arm in arms}
        assert fields == {json.dumps({} if name == "sela" else {"interaction": name})}


def test_nothing_is_chosen_before_all_has_been_tried(path: Path) -> None:
    lines = read_lines(path)
    for missing, _ in tried():
        key = Job(missing, TUNING_SEED).key(LEVEL)
        path.write_text("".join(json.dumps(one) + "\n" for one in lines if one["key"] != key))
        assert tuned_arms(LEVEL, path) is None
        assert key in {Job(arm, TUNING_SEED).key(LEVEL) for arm in choice_arms(["table4b"], LEVEL, path)}


def test_choices_look_at_the_last_validation_accuracies(path: Path) -> None:
    one = read_lines(path)[0]
    one["curve"]["validation"] = [{"a": 1.0, "b": 1.0}, {"a": 0.25, "b": 0.5}]
    one["test"] = {"a": 0.9, "b": 0.9}
    assert validation_mean(one) == pytest.approx(0.375)


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
        number = results.number[Job(_spec("pooled 1/4 + VR"), seed).key(LEVEL)]
        assert f"[{seed}]({results.path}#L{number})" in found["lines"]
        assert json.loads(results.path.read_text().splitlines()[number - 1])["seed"] == seed


def test_the_paper_stands_beside_the_arms_that_it_has() -> None:
    assert paper_scores("table4b", "global attention") == ("20.2", "36.7")
    assert paper_scores("table4c", "1, 4, 7") == ("44.2", "46.0")
    assert paper_scores("table2", "average pool + VR") == ("45.7", "47.1")
    assert paper_scores("table2", "deformable") == ("36.4", "44.1")
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
    keys = {Job(_spec("pooled 1/4 + VR"), seed).key(LEVEL) for seed in SEEDS}
    for one in lines:
        if one["key"] in keys:
            one["test"] = {task: value / (3 + 0.02 * one["seed"]) for task, value in one["test"].items()}
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = row_of(claim_rows(Results(path, LEVEL)), "It reads text and charts better")
    assert found["here"] == "the opposite holds"
    assert found["difference, points"].startswith("-")


@pytest.mark.parametrize("known", [0, 2, -1])
def test_a_file_that_lacks_choices_of_table_4b_is_reported_without_it(path: Path, known: int) -> None:
    keys = {Job(arm, seed).key(LEVEL) for arm in SUITES["table5a"] for seed in SEEDS}
    keys |= {Job(arm, TUNING_SEED).key(LEVEL) for arm, _ in tried()[:known]}
    kept = [one for one in read_lines(path) if one["key"] in keys]
    path.write_text("".join(json.dumps(one) + "\n" for one in kept))
    results = Results(path, LEVEL)
    assert len(suite_table(results, "table4b")) == len(tuning_rows(results)) == 2
    assert len(suite_table(results, "table5a")) == 2 + len(SUITES["table5a"])
    rows = claim_rows(results)
    row_of(rows, "Pooling loses detail")
    assert "SELA beats deformable attention" not in [cells(row)[0] for row in rows]
    assert "| pooled 1/4 + VR |" in report.written_part(results)


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


def test_what_was_tried_is_shown(results: Results) -> None:
    rows = tuning_rows(results)
    assert cells(rows[0])[1:] == [*SALIENCIES, *(f"rate {rate:g}" for rate in RATES)]
    assert len(rows) == 2 + len(BEST)
    for row, (saliency, best) in zip(rows[2:], BEST.values(), strict=True):
        assert all("lines.jsonl#L" in cell for cell in cells(row)[1:])
        values = [float(cell.split("]")[0].strip("[")) for cell in cells(row)[1:]]
        with_each, at_each = values[:3], values[3:]
        assert max(with_each) == with_each[list(SALIENCIES).index(saliency)] == at_each[RATES.index(LEVEL.arm.lr)]
        assert max(at_each) == at_each[RATES.index(best)]
        assert max(at_each) - min(values) == pytest.approx(10, abs=1)


def test_more_steps_stand_beside_the_same_seeds(path: Path, tmp_path: Path) -> None:
    level = replace(LEVEL, name="longer", arm=replace(LEVEL.arm, steps=7))
    more = tmp_path / "longer.jsonl"
    arms = SUITES["patience"]
    both = _spec("no compression")
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
    arms = [_spec(name) for name in SCORES if whole or name != "no compression"]
    lines = [
        {**line(arm, seed, SCORES[arm.name]), "key": Job(arm, seed).key(level)} for arm in arms for seed in SEEDS[:2]
    ]
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    stages_file(file).write_text(stages_file(path).read_text())
    wider = Results(file, level)
    page = report.written_part(Results(path, LEVEL), wider=wider)
    part = page.split("## At the paper's geometry\n\n")[1]
    assert part.startswith(f"Level `wider`, seeds [0, 1], {len(lines)} lines; torch 0.0.\n\nIn the last steps ")
    assert "the encoder named 98.0 % of" in part
    rows = [row for row in part.splitlines() if row.startswith("| ")]
    claims = [claim for claim in CLAIMS if claim.suite == "table5a" and (whole or claim.better != "no compression")]
    assert [cells(row)[0] for row in rows if "wider.jsonl#L" in row and " − " in row] == [c.text for c in claims]
    assert f"| pooled 1/4 + VR | 36 | 1,234,567 | – | {wider.mean('pooled 1/4 + VR', 'General')} |" in part
    assert ("won back" in part) == whole
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
    assert pictures == {"proof_pareto.png", "proof_density.png", "proof_forgetting.png"}


def test_a_file_without_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lines\.jsonl has no lines: no run has ended yet"):
        Results(tmp_path / "lines.jsonl", LEVEL)


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        report.updated("nothing here", "part")
