"""``python -m benchmarks.proof.times``: what arms and pruners cost, side by side in one run, on an idle machine.

Time does not depend on what an arm has learned, so all of them are built anew and take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from vision_remember import attach_pruner

from .arms import Arm, ArmSpec, build_arm
from .levels import LEVELS, Level
from .prepare import Workshop
from .prompts import prompts
from .rivals import RIVALS, windows_as_masks
from .runner import versions
from .suites import POOLED, SEARCHED_RATIOS, SUITES, distinct, searched_arms
from .train import Set, World, arm_logits
from .words import Streams

PAGES, WARM_UP = 8, 3


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
def measured(calls: Sequence[Callable[[], object]], repeats: int, device: str) -> list[list[float]]:
    """Seconds of each of some calls, which take turns; the first rounds warm up and do not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in trange(repeats + WARM_UP, desc="rounds", leave=False):
        for call, values in zip(calls, seconds, strict=True):
            start = _now(device)
            call()
            if repeat >= WARM_UP:
                values.append(_now(device) - start)
    return seconds


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Quartiles of the ratio to the reference of the same round: lower, median, upper."""
    found = statistics.quantiles([a / b for a, b in zip(seconds, reference, strict=True)], n=4)
    return [round(value, 3) for value in found]


def measure(level: Level, world: World) -> dict[str, Any]:
    """Times every distinct arm of the suites, and the pruners on the arm without compression.

    Returns:
        By arm, quartiles of "prefill" and "forward" relative to average pooling at 1/4; by pruner, those of "forward".
    """
    arms = {spec.name: _built(spec, world) for spec in _timed(world)}
    calls = {name: calls_of(arm, world) for name, arm in arms.items()}
    found: dict[str, Any] = {name: {} for name in calls}
    for part in ("prefill", "forward"):
        seconds = measured([own[part] for own in calls.values()], level.prefill_repeats, level.device)
        reference = seconds[list(calls).index(POOLED.name)]
        for name, values in zip(calls, seconds, strict=True):
            found[name][part] = ratios(values, reference)
    forward = calls[POOLED.name]["forward"]
    for rival in RIVALS:
        arm = _built(ArmSpec("no compression", projector=None, ratio=1), world)
        with ExitStack() as stack:
            stack.enter_context(windows_as_masks(arm.model.model.language_model))
            handle = attach_pruner(arm.model, rival.pruner, **rival.options)
            stack.callback(handle.detach)
            mine, other = measured([calls_of(arm, world)["forward"], forward], level.prefill_repeats, level.device)
        found[rival.name] = {"forward": ratios(mine, other)}
    return found


def _timed(world: World) -> list[ArmSpec]:
    specs = [POOLED, *(arm for arms in SUITES.values() for arm in arms)]
    specs += [arm for ratio in SEARCHED_RATIOS for arm in searched_arms(ratio)]
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
    parser.add_argument("--results", type=Path, help="JSON lines (default: benchmarks/results/proof_LEVEL.jsonl)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="pages, encoder and decoder (default: %(default)s)")
    options = parser.parse_args(arguments)
    level = LEVELS[options.level]
    results = options.results or RESULTS / f"proof_{options.level}.jsonl"
    torch.set_num_threads(level.threads)
    world = Workshop(level, options.cache).world([recipe.side for recipe in level.decoders])
    found = {"times": measure(level, world), "versions": versions()}
    times_file(results).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
