"""``python -m benchmarks.proof.times``: what arms and pruners cost, side by side in one run.

Time does not depend on what an arm has learned, so all of them are built anew and take turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.measure import Plan
from benchmarks.speed.measure import measure as side_by_side

from .arms import Arm, ArmSpec, build_arm
from .levels import LEVELS, Level
from .prepare import Workshop, settle
from .prompts import prompts
from .rivals import RIVALS, pruning
from .runner import versions
from .suites import INTERACTION_SALIENCIES, POOLED, SEARCHED, SUITES, distinct
from .train import Set, World, arm_logits
from .words import Streams

PAGES = 8


def first_questions(data: Set) -> Set:
    """The first pages with one question each."""
    index = torch.arange(min(PAGES, len(data.pages)))
    streams = data.pages.streams
    length = int((streams.branch[index] == 0).sum(1).max())
    short = Streams(*(part[:, :length] for part in (streams.tokens, streams.branch, streams.place, streams.target)))
    return Set(replace(data.pages, streams=short), data.features)


def calls_of(arm: Arm, world: World) -> dict[str, Callable[[], object]]:
    """What is timed of an arm.

    Returns:
        "prefill": projector and decoder on features that the encoder has made. "forward": the model's own forward pass,
        encoder included.
    """
    level, index = world.level, torch.arange(min(PAGES, len(world.test.pages)))
    inputs, _ = prompts(world.test.pages, arm.tokens, index, 0, level.device)
    return {
        "prefill": partial(arm_logits, arm, first_questions(world.test), index, level.device, level.half),
        "forward": partial(arm.model, **inputs),
    }


@torch.no_grad()
def measure(level: Level, world: World) -> dict[str, Any]:
    """Times every distinct arm of the suites, and the pruners on the arm without compression.

    Returns:
        By arm, quartiles of "prefill" and "forward" relative to average pooling at 1/4; by pruner, those of "forward".
    """
    calls = {spec.name: calls_of(_built(spec, world), world) for spec in _timed(world)}
    found: dict[str, Any] = {name: {} for name in calls}
    for part in ("prefill", "forward"):
        for name, quartiles in _quartiles(level, part, {name: own[part] for name, own in calls.items()}).items():
            found[name][part] = quartiles
    reference = {POOLED.name: calls[POOLED.name]["forward"]}
    for rival in RIVALS:
        arm = _built(ArmSpec("no compression", projector=None, ratio=1), world)
        with pruning(arm, rival):
            timed = _quartiles(level, rival.name, {**reference, rival.name: calls_of(arm, world)["forward"]})
        found[rival.name] = {"forward": timed[rival.name]}
    return found


def _quartiles(level: Level, case: str, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Quartiles of each call's time relative to the first's, lower, median and upper."""
    results = side_by_side(Plan(level.device, level.prefill_repeats), case, calls)
    found = {}
    for result in results:
        if result.ratio is None or result.ratio_quartiles is None:
            raise RuntimeError(f"{result.name}, {case}: {result.failure}")
        low, high = result.ratio_quartiles
        found[result.name] = [round(value, 3) for value in (low, result.ratio, high)]
    return found


def absorbed_name(arm: str) -> str:
    """Where the times of an arm stand with its cells' projections absorbed."""
    return f"{arm}, absorbed"


def absorbed(spec: ArmSpec) -> ArmSpec:
    """The arm with its cells' projections absorbed: the same function at another cost, and so timed but not trained."""
    return replace(spec, name=absorbed_name(spec.name), overrides={**spec.overrides, "absorb": "auto"})


def _timed(world: World) -> list[ArmSpec]:
    specs = [POOLED, *(arm for arms in SUITES.values() for arm in arms)]
    absorbing = [arm for arm in (*SUITES["search"], *SEARCHED) if arm.layers]
    specs += [*SEARCHED, *INTERACTION_SALIENCIES, *map(absorbed, absorbing)]
    return [spec for spec in distinct(specs) if spec.cells in world.pretrained]


def _built(spec: ArmSpec, world: World) -> Arm:
    level = world.level
    return build_arm(spec, level.shape, len(world.words), world.pretrained, 0, level.device)


def times_file(results: Path) -> Path:
    """Where the times stand that belong to a results file."""
    return results.with_suffix(".times.json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, measures and writes."""
    from .__main__ import CACHE, RESULTS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof.times", description=__doc__)
    parser.add_argument("--level", choices=list(LEVELS), default="cpu", help="how large (default: %(default)s)")
    parser.add_argument("--repeats", type=int, help="of every call (default: the level's)")
    parser.add_argument("--results", type=Path, help="JSON lines (default: benchmarks/results/proof_LEVEL.jsonl)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="pages, encoder and decoder (default: %(default)s)")
    options = parser.parse_args(arguments)
    level = LEVELS[options.level]
    if options.repeats is not None:
        if options.repeats < 1:
            parser.error(f"--repeats {options.repeats}: expected at least 1")
        level = replace(level, prefill_repeats=options.repeats)
    results = options.results or RESULTS / f"proof_{options.level}.jsonl"
    settle(level)
    sides = [recipe.side for recipe in level.decoders]
    world = Workshop(level, options.cache).world(sides[:1])
    # What a decoder has learned costs nothing: one serves for all.
    world = replace(world, pretrained=dict.fromkeys(sides, world.pretrained[sides[0]]))
    found = {"times": measure(level, world), "repeats": level.prefill_repeats, "versions": versions(level.device)}
    times_file(results).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
