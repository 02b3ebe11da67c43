"""The paper's averages, recomputed from its printed scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.official_tasks import BENCHMARKS
from benchmarks.paper_tables import (
    COLUMNS,
    COLUMNS_TABLE_3,
    GROUPS,
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLE_4,
    TABLE_5A,
    TABLE_5B,
    GroupRow,
    Row,
    average,
    average_of_groups,
    group_averages,
)

ROWS = [*TABLE_1, *TABLE_2, *TABLE_3]

# The printed scores give 46.13; the scores before they were rounded may have given 46.15 and more.
ROUNDED_UP = {(2, "pixel shuffle", True): 46.2}


def name_of(row: Row) -> str:
    return f"{row.table}-{row.label}-{row.parameters or ('with' if row.remember else 'without')}"


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_every_printed_average_comes_out(row: Row) -> None:
    known = ROUNDED_UP.get((row.table, row.label, row.remember))
    if known is None:
        assert round(average(row.scores), 1) == row.average
    else:
        # a score that is printed with one decimal may be off by 0.05, MME's by a twentieth of that
        slack = (0.05 * (len(row.scores) - 1) + 0.05 / 20) / len(row.scores)
        assert row.average == known
        assert round(average(row.scores), 1) != known
        assert round(average(row.scores) + slack, 1) == known


def test_the_mean_of_groups_is_not_what_the_paper_prints() -> None:
    pooled = TABLE_2[1]
    groups = group_averages(pooled.scores)
    assert round(sum(groups.values()) / len(groups), 1) != pooled.average


@pytest.mark.parametrize("row", TABLE_4, ids=lambda row: f"{row.table}-{row.label}")
def test_group_rows_average_by_the_number_of_benchmarks(row: GroupRow) -> None:
    assert round(average_of_groups(row.groups), 1) == row.average


@pytest.mark.parametrize(("printed", "single"), [(TABLE_4[0], TABLE_2[0]), (TABLE_4[3], TABLE_2[1])])
def test_groups_of_table_4_are_those_of_table_2(printed: GroupRow, single: Row) -> None:
    computed = group_averages(single.scores)
    assert computed.keys() == GROUPS.keys()
    # 42.55 is printed 42.6, and binary fractions may fall below the half
    assert {name: round(value + 1e-9, 1) for name, value in computed.items()} == printed.groups


def test_average_of_groups_is_the_average() -> None:
    for row in (*TABLE_1, *TABLE_2):
        assert average_of_groups(group_averages(row.scores)) == pytest.approx(average(row.scores), abs=1e-12)


def test_the_tables_agree_with_each_other() -> None:
    pooled, remembered = TABLE_2[:2]
    assert TABLE_4[0].average == pooled.average == TABLE_5A[1].average
    assert {row.average for row in TABLE_4 if row.label in ("SELA", "layers 1, 4")} == {remembered.average}
    assert TABLE_5A[2].average == remembered.average
    assert round(TABLE_1[-1].ttft_ms or 0, 1) == TABLE_5B[2].ttft_ms
    assert round(TABLE_1[2].ttft_ms or 0, 1) == TABLE_5B[1].ttft_ms


def test_groups_hold_every_benchmark_once() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COLUMNS)
    assert len(COLUMNS) == 13
    assert len(COLUMNS_TABLE_3) == 10


def test_a_group_with_a_missing_benchmark_has_no_average() -> None:
    scores = {name: 50.0 for name in COLUMNS if name != "DocVQA"}
    assert set(group_averages(scores)) == set(GROUPS) - {"OCR & Chart"}


def test_mme_counts_as_a_twentieth() -> None:
    assert average({"MME-P": 2000.0, "GQA": 0.0}) == 50.0


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "no scores"),
        ({"VQAv2": 80.0}, "'VQAv2' is no benchmark of the paper"),
        ({"OCRBench": 419.0}, "OCRBench=419.0: expected a score from 0 to 100"),
        ({"MME-P": 2001.0}, "MME-P=2001.0: expected a score from 0 to 2000"),
        ({"GQA": -0.1}, "GQA=-0.1"),
        ({"GQA": float("nan")}, "GQA=nan"),
    ],
)
def test_impossible_scores_are_refused(scores: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average(scores)


def test_groups_that_are_not_the_papers_are_refused() -> None:
    with pytest.raises(ValueError, match="groups General: expected General, Knowledge"):
        average_of_groups({"General": 50.0})


def test_the_page_lists_the_benchmarks_as_they_run() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for benchmark in BENCHMARKS.values():
        cells = benchmark.name, benchmark.group, f"`{benchmark.task}`", f"`{benchmark.metric}`", benchmark.measures
        assert f"| {' | '.join(cells)} |" in page
