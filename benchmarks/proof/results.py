"""The lines of a results file, by arm."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .arms import ArmSpec
from .levels import Level
from .pages import task_groups, task_names
from .runner import Job, by_key, read_lines, stages_file, suite_arms
from .statistics import Mean, mean_of
from .suites import SUITES, TUNING_SEED
from .times import absorbed_name, times_file

ROOT = Path(__file__).resolve().parents[2]


class Results:
    """The lines of a results file, by arm.

    Args:
        path: The file. Suites that it lacks have no lines; table 4b has no arms before all its choices are made.
        level: Its level.

    Raises:
        ValueError: a file without lines.
    """

    def __init__(self, path: Path, level: Level) -> None:
        self.path, self.level = path, level
        lines = read_lines(path)
        if not lines:
            raise ValueError(f"{path} has no lines: no run has ended yet")
        times = times_file(path)
        self.times: dict[str, Any] = json.loads(times.read_text(encoding="utf-8"))["times"] if times.exists() else {}
        self.stages: dict[str, Any] = json.loads(stages_file(path).read_text(encoding="utf-8"))
        self.number = {line["key"]: number for number, line in enumerate(lines, 1)}
        self._known = by_key(lines)
        self.lines = list(self._known.values())
        self.by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.seeds = sorted({line["seed"] for line in self.lines if line["seed"] < TUNING_SEED})
        self.suites: dict[str, list[ArmSpec]] = {name: suite_arms(name, level, path) for name in SUITES}
        for arm in (arm for arms in self.suites.values() for arm in arms):
            if arm.name not in self.by_arm:
                keys = [Job(arm, seed).key(level) for seed in self.seeds]
                self.by_arm[arm.name] = [self._known[key] for key in keys if key in self._known]
        tasks = task_names(level)
        self.groups = task_groups(tasks)

    def keep_seeds_of(self, other: Results) -> None:
        """Leaves out the lines of seeds that another level has not run of the same arm."""
        for name, lines in self.by_arm.items():
            seeds = {line["seed"] for line in other.by_arm[name]}
            self.by_arm[name] = [line for line in lines if line["seed"] in seeds]

    def tried(self, arm: ArmSpec) -> dict[str, Any] | None:
        """The arm's line of the seed that choices are made with."""
        return self._known.get(Job(arm, TUNING_SEED).key(self.level))

    def pruned(self) -> list[dict[str, Any]]:
        """The lines of the arm without compression on which pruners were tried."""
        return [line for line in self.by_arm["no compression"] if "pruned" in line]

    def tasks(self, which: str | None = None) -> list[str]:
        """The tasks of a group, a task alone, or all."""
        return [task for task, group in self.groups.items() if which in (None, group, task)]

    def mean(self, arm: str, group: str | None = None) -> Mean:
        """Mean accuracy in per cent over seeds, of the mean over tasks."""
        tasks = self.tasks(group)
        return mean_of([100 * statistics.fmean(line["test"][t] for t in tasks) for line in self.by_arm[arm]])

    def time(self, arm: str, part: str, *, absorbed: bool = False) -> float | None:
        """Median time of an arm or pruner, relative to average pooling at 1/4; None where it was not measured.

        Args:
            arm: Its name.
            part: "prefill" or "forward".
            absorbed: With the projections of the cells absorbed.
        """
        # tables share arms, whose times stand under one of their names
        every = [*SUITES.values(), *self.suites.values()]
        specs = {spec.name: spec.recipe() for arms in every for spec in arms}
        own = {**specs[arm], "lr": None} if arm in specs else None
        names = [name for name, recipe in specs.items() if own and {**recipe, "lr": None} == own] or [arm]
        names = [absorbed_name(name) if absorbed else name for name in [arm, *names]]
        found = next((self.times[name] for name in names if name in self.times), None)
        return None if found is None else float(found[part][1])

    def links(self, arm: str) -> str:
        """Links to the arm's lines."""
        return self.links_to(self.by_arm[arm])

    def links_to(self, lines: Iterable[Mapping[str, Any]]) -> str:
        """Links to lines, by their seeds."""
        return ", ".join(self.link(line, str(line["seed"])) for line in lines)

    def link(self, line: Mapping[str, Any], text: str) -> str:
        """A link to a line."""
        path = self.path.resolve()
        where = f"../{path.relative_to(ROOT)}" if path.is_relative_to(ROOT) else self.path
        return f"[{text}]({where}#L{self.number[line['key']]})"
