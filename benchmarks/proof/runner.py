"""Runs suites: every arm and seed once, one JSON line each; what is in the file already is not run again."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import scipy
import torch
import transformers
from tqdm import tqdm

import vision_remember

from .arms import ArmSpec
from .claims import DETAIL
from .insight import look_inside
from .levels import Level
from .pages import task_groups
from .prepare import Workshop, prepare, settle, stage
from .rivals import pruned
from .suites import (
    INTERACTION_NAMES,
    INTERACTION_SALIENCIES,
    RATIOS,
    SEARCHED,
    SEARCHED_RATIOS,
    SUITES,
    TUNING_SEED,
    distinct,
    interaction_arm,
    rate_arms,
    searched_arms,
)
from .train import World, run
from .workers import workers


@dataclass(frozen=True)
class Job:
    """One arm and seed.

    Attributes:
        spec: The arm.
        seed: Draws its new weights and the order of its pages.
        pruners: Whether pruners are tried on it when it is trained, which takes as long again.
    """

    spec: ArmSpec
    seed: int
    pruners: bool = False

    def key(self, level: Level) -> str:
        """What names the run in the results: equal recipes have equal keys, whatever their tables call them.

        Of the decoders only those count that the arm's own began from.
        """
        used = asdict(replace(level, decoders=level.decoders_until(self.spec.cells)))
        known = {"arm": self.spec.recipe(), "seed": self.seed, "level": used}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]

    def ended(self, line: Mapping[str, Any] | None) -> bool:
        """Whether the run's line, if there is one, says all that is asked for."""
        return line is not None and (not self.pruners or "pruned" in line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file, without a last one that is cut off: a process ended there, or is still writing."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def by_key(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Lines by the key of their run; of two of one run the later counts, which was made again to say more."""
    return {line["key"]: line for line in lines}


def drop_cut_line(path: Path) -> None:
    """Takes a last line that was cut off in the middle out of a results file, which is about to grow."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def run_suites(
    names: Sequence[str],
    seeds: Sequence[int],
    level: Level,
    folder: Path,
    results: Path,
    jobs: int,
    ratios: Sequence[int] = RATIOS,
) -> None:
    """Runs what is missing of some suites, of the ratios whose decoder reads its tokens (`Level.reads_enough`).

    Args:
        names: Suites.
        seeds: Below `TUNING_SEED`, which is for choices.
        level: How large.
        folder: Where pages, encoder and decoder are kept.
        results: The file of JSON lines, which grows.
        jobs: Processes side by side.
        ratios: Compression ratios whose arms are run; those without compression go with the first of `RATIOS`.

    Raises:
        ValueError: a seed that choices are made with, or suites of which no arm has such a ratio.
        RuntimeError: some runs failed; the lines of the others are written.
    """
    if not all(0 <= seed < TUNING_SEED for seed in seeds):
        raise ValueError(
            f"seeds {list(seeds)}: expected 0..{TUNING_SEED - 1}; from {TUNING_SEED} on they are for choices"
        )
    wanted = {math.isqrt(ratio) for ratio in ratios}
    sides = sorted({arm.cells for name in names for arm in SUITES[name]} & wanted)
    if not sides:
        raise ValueError(f"ratios {list(ratios)}: expected one that an arm of {', '.join(names)} has")
    results.parent.mkdir(parents=True, exist_ok=True)
    workshop = Workshop(level, folder)
    with workers(jobs) as pool:

        def run(sides: Sequence[int]) -> None:
            reads = note_stages(workshop, sides, stages_file(results))

            def run_arms(arms: Iterable[ArmSpec], seeds: Sequence[int]) -> None:
                read = [arm for arm in arms if arm.cells in sides and reads_tokens(arm, reads, level)]
                read.sort(key=lambda arm: arm.ratio)  # the longest first, so that no process waits long for the last
                # Seed after seed, so that a run that is stopped has whole seeds.
                wanted = [
                    Job(arm, seed, pruners="rivals" in names and arm.projector is None)
                    for seed in seeds
                    for arm in read
                ]
                _run_jobs(wanted, level, folder, results, pool)

            arms = [arm for arm in arms_of(names, level, results) if arm.cells in sides]
            unread = {(arm.cells, arm.token_cells) for arm in arms if not reads_tokens(arm, reads, level)}
            for side, cells in sorted(unread):
                accuracy, least = reads[str(side)][str(cells)], level.reads_enough
                tqdm.write(
                    f"arms with tokens of {cells} x {cells} cells are left out: the decoder reads {accuracy:.1%} of "
                    f"new look-ups, not {least:.0%}"
                )
            run_arms(choice_arms(names, level), [TUNING_SEED])
            run_arms(arms_of(names, level, results), seeds)

        prepare(level, folder, sides[0], pool)
        if len(sides) == 1:
            run(sides)
            return
        # Each decoder begins from the one before, so that they take one process; the first ratio's arms go beside.
        decoders = pool.submit(stage, level, folder, "decoder", sides[-1])
        run(sides[:1])
        decoders.result()
        run(sides)


def reads_tokens(arm: ArmSpec, reads: Mapping[str, Mapping[str, float]], level: Level) -> bool:
    """Whether the decoder that an arm starts from has learned to read such tokens as the arm has.

    Args:
        arm: The arm.
        reads: What the decoders read, by side and by that of the tokens, as `note_stages` returns it.
        level: Says how much is enough.
    """
    return reads[str(arm.cells)][str(arm.token_cells)] >= level.reads_enough


def choice_arms(names: Iterable[str], level: Level) -> list[ArmSpec]:
    """The distinct arms that some suites try with `TUNING_SEED` before they choose some of their own."""
    tried = {
        "table4b": [arm for name in INTERACTION_NAMES for arm in rate_arms(interaction_arm(name), level)],
        "search": [*SEARCHED, *INTERACTION_SALIENCIES],
    }
    return distinct([arm for name in names for arm in tried.get(name, ())])


def note_stages(workshop: Workshop, sides: Iterable[int], path: Path) -> dict[str, Any]:
    """Writes what encoder and decoders had learned before the arms, beside what is known of other decoders.

    Returns:
        What the decoders read, by side.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = workshop.facts(sides)
    for part in ("reads", "curves"):
        found[part] = {**known.get(part, {}), **found[part]}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    reads: dict[str, Any] = found["reads"]
    return reads


def stages_file(results: Path) -> Path:
    """Where it stands what encoder and decoders had learned before the runs of a results file."""
    return results.with_suffix(".stages.json")


def arms_of(names: Iterable[str], level: Level, results: Path) -> list[ArmSpec]:
    """The distinct arms of some suites, in their order; those of table 4b as tuning chose them."""
    arms: list[ArmSpec] = []
    for name in names:
        arms += suite_arms(name, level, results)
    return distinct(arms)


def suite_arms(name: str, level: Level, results: Path) -> list[ArmSpec]:
    """A suite's arms, with those that its own choices lead to; none of table 4b before all its choices are made."""
    if name == "table4b":
        return tuned_arms(level, results) or []
    return distinct([*SUITES[name], *chosen_arms(level, results)]) if name == "search" else SUITES[name]


def chosen_arms(level: Level, results: Path) -> list[ArmSpec]:
    """What did best at each ratio, as `choosing_mean` says: of all, of what adds no parameters, of single blocks."""
    arms: list[ArmSpec] = []
    for ratio in SEARCHED_RATIOS:
        if runs := _tried(searched_arms(ratio), level, results):
            size = runs[0][1]["parameters"]["blocks"]
            small = [(arm, line) for arm, line in runs if line["parameters"]["blocks"] <= size]
            single = [(arm, line) for arm, line in runs if len(arm.layers) == 1]
            arms += [max(some, key=lambda run: choosing_mean(run[1]))[0] for some in (runs, small, single) if some]
    return distinct(arms)


def _tried(arms: Sequence[ArmSpec], level: Level, results: Path) -> list[tuple[ArmSpec, dict[str, Any]]]:
    """Arms with their lines of `TUNING_SEED`; empty before all of them have been tried."""
    lines = by_key(read_lines(results))
    runs = [(arm, lines.get(Job(arm, TUNING_SEED).key(level))) for arm in arms]
    known = [(arm, line) for arm, line in runs if line is not None]
    return known if len(known) == len(runs) else []


def tuned_arms(level: Level, results: Path) -> list[ArmSpec] | None:
    """Table 4b's arms, each at the rate that did best on the validation pages; None before all have been tried."""
    arms = []
    for name, title in INTERACTION_NAMES.items():
        runs = _tried(rate_arms(interaction_arm(name), level), level, results)
        if not runs:
            return None
        best, _ = max(runs, key=lambda run: validation_mean(run[1]))
        arms.append(replace(best, name=title))
    return arms


def validation_mean(line: Mapping[str, Any]) -> float:
    """Mean over tasks of the last validation accuracy of a run."""
    return statistics.fmean(line["curve"]["validation"][-1].values())


def choosing_mean(line: Mapping[str, Any]) -> float:
    """The last validation accuracy of a run on the tasks of other groups than the one that a default is judged by."""
    last = line["curve"]["validation"][-1]
    return statistics.fmean(last[task] for task, group in task_groups(list(last)).items() if group != DETAIL)


def _run_jobs(wanted: Sequence[Job], level: Level, folder: Path, results: Path, pool: Executor) -> None:
    drop_cut_line(results)
    lines = by_key(read_lines(results))
    left = [job for job in wanted if not job.ended(lines.get(job.key(level)))]
    failed: dict[str, BaseException] = {}
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(left), desc="runs", dynamic_ncols=True)
    with bar, results.open("a", encoding="utf-8") as file:
        running = {pool.submit(run_job, job, level, folder): job for job in left}
        try:
            for future in as_completed(running):
                name = f"{running[future].spec.name}, seed {running[future].seed}"
                if error := future.exception():  # the other runs do not suffer for it
                    failed[name] = error
                    tqdm.write(f"{name}: {type(error).__name__}: {error}")
                    continue
                file.write(json.dumps(future.result()) + "\n")
                file.flush()
                bar.update()
                bar.set_postfix_str(name)
        finally:
            for future in running:  # after Ctrl-C nobody would write down what is still waiting
                future.cancel()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(left)} runs failed: {'; '.join(failed)}") from next(
            iter(failed.values())
        )


@cache
def _world(level: Level, folder: Path, side: int) -> World:
    return Workshop(level, folder).world(sorted({2, side}))


def run_job(job: Job, level: Level, folder: Path) -> dict[str, Any]:
    """One line of the results."""
    settle(level)
    world = _world(level, folder, job.spec.cells)
    arm, found = run(job.spec, job.seed, world, _silent(level.arm.steps))
    if job.pruners:
        found["pruned"] = pruned(arm, world)
    if job.spec.recipe() in [shown.recipe() for shown in SUITES["table5a"]]:  # whose insides the figures show
        found["inside"] = look_inside(arm, world)
    return {
        "key": job.key(level),
        "level": level.name,
        "arm": job.spec.name,
        "seed": job.seed,
        "recipe": job.spec.recipe(),
        **found,
        "versions": versions(level.device),
    }


def _silent(steps: int) -> Iterable[tqdm[Any]]:
    """A run's own progress, unseen: only the bar over all runs shows."""
    with tqdm(total=steps, disable=True) as bar:
        for _ in range(steps):
            yield bar
            bar.update()


def versions(device: str = "cpu") -> dict[str, str]:
    """What a run depends on besides its recipe; on a GPU also which one it is."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scipy": scipy.__version__,
        "vision_remember": vision_remember.__version__,
        **gpu,
    }
