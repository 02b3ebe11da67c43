"""A results file of the proof whose numbers are known: what tests of its choices and its report read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.proof.arms import ArmSpec
from benchmarks.proof.claims import DETAIL
from benchmarks.proof.levels import TINY, Level
from benchmarks.proof.pages import task_groups, task_names
from benchmarks.proof.runner import Job, arms_of, stages_file
from benchmarks.proof.suites import (
    INTERACTION_SALIENCIES,
    POOLED,
    SUITES,
    TUNING_FACTORS,
    TUNING_SEED,
    interaction_arm,
    rate_arms,
    searched_arms,
)
from benchmarks.proof.times import absorbed_name, times_file

LEVEL = replace(TINY, name="fixture")
TASKS = task_names(LEVEL)
GROUPS = task_groups(TASKS)
RATES = [factor * LEVEL.arm.lr for factor in TUNING_FACTORS]
BEST = {"global": RATES[0], "deformable": RATES[2], "sela": RATES[1]}
"""The rate that each interaction does best with."""
SEEDS = (0, 1)
SEARCH_WINNER = "1/4: two query layers"
SCORES = {"no compression": 0.9, "pooled 1/4": 0.4, "pooled 1/4 + VR": 0.85}
"""On OCR & Chart, as seed 0 has them; every other arm has 0.3."""


def tried() -> list[tuple[ArmSpec, float]]:
    """What is tried for table 4b, with its validation accuracy."""
    return [
        (arm, 0.6 if rate == best else 0.52)
        for name, best in BEST.items()
        for arm, rate in zip(rate_arms(interaction_arm(name), LEVEL), RATES, strict=True)
    ]


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


def write_lines(tmp_path: Path) -> Path:
    """A file with every run of every suite, the tuning runs first, as the runner writes them."""
    scores = [(arm, 0.5) for arm in INTERACTION_SALIENCIES]
    scores += [(arm, 0.7 if arm.name == SEARCH_WINNER else 0.6) for arm in searched_arms(4)]
    scores += tried()
    # what two suites try is run once
    lines = list({(one := line(arm, TUNING_SEED, score))["key"]: one for arm, score in scores}.values())
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
        known = next((name for name in SCORES if spec_of(name).recipe() == arm.recipe()), None)
        lines += [line(arm, seed, SCORES[known] if known else 0.3) for seed in SEEDS]
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return file


def write_runs(file: Path, level: Level, arms: Sequence[ArmSpec], seeds: Sequence[int], stages: Path) -> None:
    """A file with runs of some arms of `SCORES` at a level, and with the stages of another file."""
    lines = [{**line(arm, seed, SCORES[arm.name]), "key": Job(arm, seed).key(level)} for arm in arms for seed in seeds]
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    stages_file(file).write_text(stages_file(stages).read_text())


def spec_of(name: str) -> ArmSpec:
    return next(arm for arm in SUITES["table5a"] if arm.name == name)


def all_of(name: str) -> list[float]:
    """The arm's mean accuracy over tasks, in per cent, by seed."""
    return [100 * statistics.fmean(line(spec_of(name), seed, SCORES[name])["test"].values()) for seed in SEEDS]


def detail_of(name: str, seed: int) -> float:
    """The arm's mean on OCR & Chart, in per cent."""
    test = line(spec_of(name), seed, SCORES[name])["test"]
    return 100 * statistics.fmean(test[task] for task in TASKS if GROUPS[task] == DETAIL)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def row_of(rows: list[str], first: str) -> dict[str, str]:
    found = [cells(row) for row in rows if cells(row)[0] == first]
    assert len(found) == 1, f"{first!r} stands {len(found)} times"
    return dict(zip(cells(rows[0]), found[0], strict=True))
