"""The proof's runner: what is run, once, in which order, and what a run that was stopped leaves."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.proof import report, runner
from benchmarks.proof.levels import CPU, TINY, Level
from benchmarks.proof.prepare import PART, Workshop
from benchmarks.proof.runner import Job, arms_of, choice_arms, read_lines, run_suites, stages_file
from benchmarks.proof.suites import SUITES, TUNING_SEED

LEVEL = replace(TINY, tasks=("attribute", "characters"))


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_a_run_that_was_cut_off_goes_on_and_is_reported(tmp_path: Path) -> None:
    results, cache = tmp_path / "lines.jsonl", tmp_path / "cache"
    run_suites(["controls"], range(2), LEVEL, cache, results, 1)
    first = read_lines(results)
    wanted = {Job(arm, seed).key(LEVEL) for seed in (0, 1) for arm in arms_of(["controls"], LEVEL, results)}
    assert {line["key"] for line in first} == wanted
    assert len(first) == 2 * len(SUITES["controls"])

    text = results.read_text().splitlines(keepends=True)
    cut = "".join(text[:-1]) + text[-1][:40]  # killed in the middle of a line
    results.write_text(cut)
    assert report.Results(results, LEVEL).lines == first[:-1]
    assert results.read_text() == cut  # a report changes nothing: a process may be about to write the rest
    run_suites(["controls"], range(2), LEVEL, cache, results, 1)
    again = read_lines(results)
    assert again[:-1] == first[:-1]
    for name in ("key", "test", "curve", "parameters"):
        assert again[-1][name] == first[-1][name]
    whole = results.read_bytes()
    run_suites(["controls"], range(2), LEVEL, cache, results, 1)
    assert results.read_bytes() == whole

    page = tmp_path / "proof.md"
    page.write_text(f"# Proof\n\n{report.BEGIN}\n{report.END}\n")
    found = report.Results(results, LEVEL)
    part = report.written_part(found)
    page.write_text(report.updated(page.read_text(), part))
    assert report.updated(page.read_text(), part) == page.read_text()
    assert "The gain is not that of more parameters" in part
    assert f"lines.jsonl#L{found.number[first[0]['key']]}" in part
    assert all(line["seed"] < TUNING_SEED for line in again)


@pytest.mark.parametrize("pixels", [True, False])
def test_pages_that_a_pool_draws_are_those_of_one_process(pixels: bool, tmp_path: Path) -> None:
    level = replace(LEVEL, train_pages=PART + 3, symbol_pages=PART + 3)
    name = "train" if pixels else "symbols"
    with ThreadPoolExecutor(2) as pool:
        drawn = Workshop(level, tmp_path / "pool").pages(name, pool).state()
    alone = Workshop(level, tmp_path / "alone").pages(name).state()
    assert drawn.keys() == alone.keys()
    for part in alone:
        assert torch.equal(drawn[part], alone[part]), part


def test_one_ratio_alone_makes_its_own_decoder_only(tmp_path: Path) -> None:
    results, cache = tmp_path / "lines.jsonl", tmp_path / "cache"
    level = replace(LEVEL, half=True)
    run_suites(["table5a"], [0], level, cache, results, 1, [9])
    assert {line["arm"] for line in read_lines(results)} == {"pooled 1/9", "pooled 1/9 + VR"}
    assert list(json.loads(stages_file(results).read_text())["reads"]) == ["3"]
    assert not list(cache.glob("decoder-4-*"))
    with pytest.raises(ValueError, match=r"ratios \[9\]: expected one that an arm of controls has"):
        run_suites(["controls"], [0], level, cache, results, 1, [9])


def test_a_run_that_fails_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(job: Job, level: Level, folder: Path) -> dict[str, Any]:
        if job.spec.name == "pooled":
            raise MemoryError("no room")
        return {"key": job.key(level)}

    monkeypatch.setattr(runner, "run_job", one)
    jobs, results = [Job(arm, 0) for arm in SUITES["controls"]], tmp_path / "lines.jsonl"
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(RuntimeError, match=f"1 of {len(SUITES['controls'])} runs failed: pooled, seed 0"),
    ):
        runner._run_jobs(jobs, LEVEL, tmp_path, results, pool)
    assert {line["key"] for line in read_lines(results)} == {job.key(LEVEL) for job in jobs[1:]}


def test_runs_that_wait_are_given_up_when_the_proof_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    let_go = threading.Event()

    def one(job: Job, level: Level, folder: Path) -> dict[str, Any]:
        begun.append(job.spec.name)
        let_go.wait(60)
        return {}

    def interrupted(futures: Iterable[Future[Any]]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_job", one)
    monkeypatch.setattr(runner, "as_completed", interrupted)
    jobs = [Job(arm, 0) for arm in SUITES["controls"]]
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(KeyboardInterrupt):
            runner._run_jobs(jobs, LEVEL, tmp_path, tmp_path / "lines.jsonl", pool)
        let_go.set()
    assert begun in ([], ["pooled"])


def test_what_two_suites_try_is_tried_once() -> None:
    names = [Job(arm, TUNING_SEED).key(LEVEL) for arm in choice_arms(SUITES, LEVEL)]
    assert len(set(names)) == len(names)
    assert len(names) < sum(len(choice_arms([suite], LEVEL)) for suite in SUITES)


def test_committed_results_are_those_of_the_level_as_it_is() -> None:
    """Whatever changes around the level cpu, its runs keep their names: nobody has to run them again."""
    path = Path(report.__file__).parents[1] / "results" / "proof_cpu.jsonl"
    keys = {line["key"] for line in read_lines(path)}
    arms = [arm for suite in ("table2", "table4a", "table4c", "table5a", "controls", "rivals") for arm in SUITES[suite]]
    assert {Job(arm, 0).key(CPU) for arm in arms} <= keys


def test_pruners_are_tried_where_their_suite_asks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that was written without them is made again, and the new one counts."""
    asked: list[Job] = []

    def one(job: Job, level: Level, folder: Path) -> dict[str, Any]:
        asked.append(job)
        pruned = {"pruned": {"none": {}}} if job.pruners else {}
        return {"key": job.key(level), "seed": job.seed, **pruned}

    monkeypatch.setattr(runner, "run_job", one)
    monkeypatch.setattr(runner, "prepare", lambda *arguments: None)
    monkeypatch.setattr(runner, "workers", ThreadPoolExecutor)
    read = {"reads": {"2": {"1": 1.0, "2": 1.0}}, "curves": {}}
    monkeypatch.setattr(Workshop, "facts", lambda workshop, sides: copy.deepcopy(read))
    results = tmp_path / "lines.jsonl"
    run_suites(["table5a"], [0], LEVEL, tmp_path, results, 1, [4])
    assert [job.spec.name for job in asked] == ["no compression", "pooled 1/4", "pooled 1/4 + VR"]
    assert not any(job.pruners for job in asked)
    assert report.Results(results, LEVEL).pruned() == []

    del asked[:]
    run_suites(["rivals"], [0], LEVEL, tmp_path, results, 1, [4])
    assert [job.spec.name for job in asked if job.pruners] == ["no compression"]
    assert not {"pooled 1/4", "pooled 1/4 + VR"} & {job.spec.name for job in asked}
    found = report.Results(results, LEVEL)
    (line,) = found.pruned()
    assert found.number[line["key"]] == 4
    assert len(found.lines) == len(read_lines(results)) - 1

    for names in (["rivals"], ["table5a"]):  # nothing is asked for that is not there
        del asked[:]
        run_suites(names, [0], LEVEL, tmp_path, results, 1, [4])
        assert not asked


def test_seeds_for_choices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seeds \[100\]: expected 0..99"):
        run_suites(["controls"], [TUNING_SEED], LEVEL, tmp_path, tmp_path / "lines.jsonl", 1)
