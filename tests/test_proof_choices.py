"""What the proof chooses by: saliencies, rates and a default, from validation accuracies that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.proof import report
from benchmarks.proof.claims import DETAIL
from benchmarks.proof.results import Results
from benchmarks.proof.runner import (
    Job,
    choice_arms,
    chosen_arms,
    read_lines,
    suite_arms,
    tuned_arms,
    validation_mean,
)
from benchmarks.proof.suites import INTERACTION_NAMES, SALIENCIES, SUITES, TUNING_SEED, boosted_arms, searched_arms
from benchmarks.proof.tables import claim_rows, interaction_rows, search_rows, suite_table, tuning_rows
from tests.proof_lines import (
    BEST,
    GROUPS,
    LEVEL,
    RATES,
    SEARCH_WINNER,
    SEEDS,
    cells,
    row_of,
    tried,
    write_lines,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_lines(tmp_path)


@pytest.fixture
def results(path: Path) -> Results:
    return Results(path, LEVEL)


def test_each_interaction_takes_the_rate_that_validation_prefers(path: Path) -> None:
    chosen = tuned_arms(LEVEL, path)
    assert chosen is not None
    assert [arm.name for arm in chosen] == [INTERACTION_NAMES[name] for name in BEST]
    by_name = dict(zip(BEST, chosen, strict=True))
    assert {name: arm.lr for name, arm in by_name.items()} == {"global": RATES[0], "deformable": RATES[2], "sela": None}
    # the rate that every other table uses goes unsaid: this SELA is the arm of the search
    assert by_name["sela"].recipe() == boosted_arms(4)[0].recipe()
    rows = suite_table(Results(path, LEVEL), "table4b")
    said = [f"{INTERACTION_NAMES[name]} (rate {rate:g})" for name, rate in BEST.items()]
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


def test_every_interaction_is_tuned_alike() -> None:
    """At the same rates, with the default's saliency; they differ in nothing else."""
    arms = choice_arms(["table4b"], LEVEL)
    assert len(arms) == len(BEST) * len(RATES)
    for name in BEST:
        own = [arm for arm in arms if arm.overrides.get("interaction", "sela") == name]
        # the level's own rate goes unsaid
        assert [arm.lr or LEVEL.arm.lr for arm in own] == RATES
        for arm in own:
            overrides = {field: value for field, value in arm.overrides.items() if field != "interaction"}
            assert replace(arm, name="", lr=None, overrides=overrides) == replace(boosted_arms(4)[0], name="")


def test_nothing_is_chosen_before_all_has_been_tried(path: Path) -> None:
    lines = read_lines(path)
    for missing, _ in tried():
        key = Job(missing, TUNING_SEED).key(LEVEL)
        path.write_text("".join(json.dumps(one) + "\n" for one in lines if one["key"] != key))
        assert tuned_arms(LEVEL, path) is None
        assert key in {Job(arm, TUNING_SEED).key(LEVEL) for arm in choice_arms(["table4b"], LEVEL)}


def test_choices_look_at_the_last_validation_accuracies(path: Path) -> None:
    one = read_lines(path)[0]
    one["curve"]["validation"] = [{"a": 1.0, "b": 1.0}, {"a": 0.25, "b": 0.5}]
    one["test"] = {"a": 0.9, "b": 0.9}
    assert validation_mean(one) == pytest.approx(0.375)


@pytest.mark.parametrize("known", [0, 2, -1])
def test_a_file_that_lacks_choices_of_table_4b_is_reported_without_it(path: Path, known: int) -> None:
    keys = {Job(arm, seed).key(LEVEL) for arm in SUITES["table5a"] for seed in SEEDS}
    keys |= {Job(arm, TUNING_SEED).key(LEVEL) for arm, _ in tried()[:known]}
    kept = [one for one in read_lines(path) if one["key"] in keys]
    path.write_text("".join(json.dumps(one) + "\n" for one in kept))
    results = Results(path, LEVEL)
    assert len(suite_table(results, "table4b")) == 2
    assert len(tuning_rows(results)) == 2 + len(tried()[:known]) // len(RATES)  # of those that have been tried whole
    assert len(suite_table(results, "table5a")) == 2 + len(SUITES["table5a"])
    rows = claim_rows(results)
    row_of(rows, "Pooling loses detail")
    assert "SELA beats deformable attention" not in [cells(row)[0] for row in rows]
    assert "| pooled 1/4 + VR |" in report.written_part(results)


def test_what_was_tried_is_shown(results: Results) -> None:
    for rows, columns in (
        (tuning_rows(results), [f"rate {rate:g}" for rate in RATES]),
        (interaction_rows(results), list(SALIENCIES)),
    ):
        assert cells(rows[0])[1:] == columns
        assert [cells(row)[0] for row in rows[2:]] == [INTERACTION_NAMES[name] for name in BEST]
        assert all("lines.jsonl#L" in cell for row in rows[2:] for cell in cells(row)[1:])
    for row, best in zip(tuning_rows(results)[2:], BEST.values(), strict=True):
        values = [float(cell.split("]")[0].strip("[")) for cell in cells(row)[1:]]
        assert max(values) == values[RATES.index(best)]
        assert max(values) - min(values) == pytest.approx(8, abs=1)
