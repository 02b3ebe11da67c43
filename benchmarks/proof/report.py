"""``python -m benchmarks.proof.report``: writes docs/proof.md and its figures from the lines of a results file."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper_tables import GROUPS, TABLE_2, TABLE_4, TABLE_5A, group_averages

from .arms import ArmSpec
from .claims import CLAIMS, DETAIL, Claim
from .figures import density_figure, forgetting_figure, pareto_figure
from .levels import CPU, LEVELS, LONG, Level
from .longer import longer_rows
from .pages import task_groups, task_names
from .runner import Job, choosing_mean, is_tuned, read_lines, stages_file, suite_arms, validation_mean
from .statistics import Mean, compared, mean_of, recovered
from .suites import (
    INTERACTION_NAMES,
    RATIOS,
    SEARCHED,
    SUITES,
    TUNING_FACTORS,
    TUNING_SEED,
    tuning_arms,
)
from .times import absorbed_name, times_file

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- Written by benchmarks/proof/report.py; do not edit by hand. -->", "<!-- End of the written part. -->"
TITLES = {
    "table2": "Table 2: projectors, without and with Vision Remember",
    "table4a": "Table 4a: components",
    "table4b": "Table 4b: interactions, each with its own learning rate",
    "table4c": "Table 4c: where the blocks stand",
    "table5a": "Table 5a: against no compression, at three ratios",
    "controls": "Controls: as many parameters, as much compute",
    "search": "Search for a better default: chosen on other tasks and a seed of its own, then run as all others",
    "rivals": "Rivals: features added in place of attention, and tokens pruned without training",
}
_PAPER_4 = {
    "baseline (average pool)": ("4a", "baseline"),
    "+ resample (deformable, last level)": ("4a", "vision resample"),
    "+ multi-level": ("4a", "vision resample, several levels"),
    "+ SELA": ("4a", "vision resample, several levels, SELA"),
    "global attention": ("4b", "global attention"),
    "deformable attention": ("4b", "deformable attention"),
    "SELA": ("4b", "SELA"),
    "1": ("4c", "layer 1"),
    "1, 4": ("4c", "layers 1, 4"),
    "1, 4, 7": ("4c", "layers 1, 4, 7"),
}
_PAPER_2 = {"average pool": "average pooling", "PixelShuffle": "pixel shuffle", "deformable": "deformable attention",
            "LDPv2": "LDPv2"}  # fmt: skip
_PAPER_5A = {"no compression": "no compression", "pooled 1/4": "baseline", "pooled 1/4 + VR": "Ours"}


class Results:
    """The lines of a results file, by arm.

    Args:
        path: The file. Suites that it lacks have no lines; table 4b has no arms before all its rates are tried.
        level: Its level.
        seeds: Which lines of arms count; None for all but those of choices.

    Raises:
        ValueError: a file without lines.
    """

    def __init__(self, path: Path, level: Level, *, seeds: Sequence[int] | None = None) -> None:
        self.path, self.level = path, level
        self.lines = read_lines(path)
        if not self.lines:
            raise ValueError(f"{path} has no lines: no run has ended yet")
        times = times_file(path)
        self.times: dict[str, Any] = json.loads(times.read_text(encoding="utf-8"))["times"] if times.exists() else {}
        self.stages: dict[str, Any] = json.loads(stages_file(path).read_text(encoding="utf-8"))
        self.number = {line["key"]: number for number, line in enumerate(self.lines, 1)}
        self.by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
        if seeds is None:
            seeds = sorted({line["seed"] for line in self.lines if line["seed"] < TUNING_SEED})
        known = {line["key"]: line for line in self.lines}
        tuned = is_tuned(level, path)
        self.suites: dict[str, list[ArmSpec]] = {
            name: suite_arms(name, level, path) if tuned or name != "table4b" else [] for name in SUITES
        }
        for arm in (arm for arms in self.suites.values() for arm in arms):
            if arm.name not in self.by_arm:
                keys = [Job(arm, seed).key(level) for seed in seeds]
                self.by_arm[arm.name] = [known[key] for key in keys if key in known]
        self.seeds = seeds
        tasks = task_names(level)
        self.groups = task_groups(tasks)

    def tasks(self, group: str | None = None) -> list[str]:
        """The tasks of a group, or all."""
        return [task for task, of in self.groups.items() if group in (None, of)]

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
        specs = {spec.name: spec.recipe() for arms in self.suites.values() for spec in arms}
        own = {**specs[arm], "lr": None} if arm in specs else None
        names = [name for name, recipe in specs.items() if own and {**recipe, "lr": None} == own] or [arm]
        names = [absorbed_name(name) if absorbed else name for name in [arm, *names]]
        found = next((self.times[name] for name in names if name in self.times), None)
        return None if found is None else float(found[part][1])

    def links(self, arm: str) -> str:
        """Links to the arm's lines."""
        return ", ".join(self.link(line, str(line["seed"])) for line in self.by_arm[arm])

    def link(self, line: Mapping[str, Any], text: str) -> str:
        """A link to a line."""
        path = self.path.resolve()
        where = f"../{path.relative_to(ROOT)}" if path.is_relative_to(ROOT) else self.path
        return f"[{text}]({where}#L{self.number[line['key']]})"


def suite_table(results: Results, suite: str) -> list[str]:
    """A suite's arms: ours by group, the paper's beside."""
    header = [
        "arm",
        "tokens",
        "added parameters",
        "prefill",
        *GROUPS,
        "mean",
        "paper: OCR & Chart",
        "paper: mean",
        "lines",
    ]
    rows = [header, ["---"] * len(header)]
    for arm in results.suites[suite]:
        lines = results.by_arm[arm.name]
        if not lines:
            continue
        name = arm.name if arm.lr is None else f"{arm.name} (rate {arm.lr:g})"
        paper_detail, paper_mean = paper_scores(suite, arm.name)
        groups = [str(results.mean(arm.name, group)) if results.tasks(group) else "–" for group in GROUPS]
        added = f"{lines[0]['parameters']['blocks']:,}"
        rows.append([name, str(lines[0]["tokens"]), added, _ratio(results.time(arm.name, "prefill")), *groups,
                     str(results.mean(arm.name)), paper_detail, paper_mean, results.links(arm.name)])  # fmt: skip
    return ["| " + " | ".join(row) + " |" for row in rows]


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def paper_scores(suite: str, arm: str) -> tuple[str, str]:
    """What the paper prints for an arm: OCR & Chart and the mean; "–" where it prints nothing."""
    if suite in ("table4a", "table4b", "table4c") and arm in _PAPER_4:
        row = next(row for row in TABLE_4 if (row.table, row.label) == _PAPER_4[arm])
        return f"{row.groups[DETAIL]:.1f}", f"{row.average:.1f}"
    plain = arm.removesuffix(" + VR")
    if suite == "table2" and plain in _PAPER_2:
        printed = next(row for row in TABLE_2 if row.label == _PAPER_2[plain] and row.remember == (plain != arm))
        return f"{group_averages(printed.scores)[DETAIL]:.1f}", f"{printed.average:.1f}"
    if suite == "table5a" and arm in _PAPER_5A:
        budget = next(row for row in TABLE_5A if row.label == _PAPER_5A[arm])
        return "–", f"{budget.average:.1f}"
    return "–", "–"


def claim_rows(results: Results) -> list[str]:
    """Each claim, what the paper says, what the runs say."""
    rows = [["claim", "paper", "compared", "difference, points", "p", "here"], ["---"] * 6]
    for claim in CLAIMS:
        if results.by_arm[claim.better] and results.by_arm[claim.worse] and results.tasks(claim.group):
            rows.append(_claim_row(results, claim))
    return ["| " + " | ".join(row) + " |" for row in rows]


def _claim_row(results: Results, claim: Claim) -> list[str]:
    better, worse = results.by_arm[claim.better], results.by_arm[claim.worse]
    found = compared(better, worse, results.tasks(claim.group), claim.margin)
    on = f" ({claim.group})" if claim.group else ""
    sides = f"{claim.better} {results.links(claim.better)} − {claim.worse} {results.links(claim.worse)}{on}"
    p = "–" if found.p is None else f"{found.p:.2g}"
    return [claim.text, claim.where, sides, f"{found.difference:+.1f}", p, found.verdict]


def recovery_rows(results: Results) -> list[str]:
    """What share of the loss on OCR & Chart is won back at each ratio."""
    header = [
        "ratio",
        "pooled",
        "with Vision Remember",
        "no compression",
        "won back, %",
        "prefill, to pooled",
        "absorbed",
    ]
    rows = [header, ["---"] * len(header)]
    arms = [(f"1/{ratio}", f"pooled 1/{ratio} + VR") for ratio in RATIOS]
    arms += [(arm.name, arm.name) for arm in results.suites["search"] if arm.name.startswith("1/")]
    for title, mine in arms:
        low, high = f"pooled {title.split(':')[0]}", "no compression"
        if all(results.by_arm[name] for name in (low, mine, high)):
            share = recovered(*(results.by_arm[name] for name in (mine, low, high)), results.tasks(DETAIL))
            base = results.time(low, "prefill")
            times = [results.time(mine, "prefill", absorbed=absorbed) for absorbed in (False, True)]
            cells = [str(results.mean(name, DETAIL)) for name in (low, mine, high)]
            ratios = [_ratio(time and base and time / base) for time in times]
            rows.append([title, *cells, str(share or "–"), *ratios])
    return ["| " + " | ".join(row) + " |" for row in rows]


def task_rows(results: Results) -> list[str]:
    """Accuracy by task of the arms that everything is about."""
    arms = [
        "no compression",
        "pooled 1/4",
        "pooled 1/4 + VR",
        "pooled + MLP of equal parameters",
        "the paper as printed",
    ]
    arms = [arm for arm in arms if results.by_arm[arm]]
    rows = [["task", "group", *arms], ["---"] * (2 + len(arms))]
    for task, group in results.groups.items():
        cells = [mean_of([100 * line["test"][task] for line in results.by_arm[arm]]) for arm in arms]
        rows.append([f"`{task}`", group, *map(str, cells)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def search_rows(results: Results) -> list[str]:
    """Validation accuracy of everything that was tried for the default, on the seed that is for choices."""
    known = {line["key"]: line for line in results.lines}
    rows = [["tried", f"validation, {DETAIL}", "validation, the other groups, which choose"], ["---"] * 3]
    for arm in SEARCHED:
        line = known.get(Job(arm, TUNING_SEED).key(results.level))
        if line is not None:
            last = line["curve"]["validation"][-1]
            detail = f"{100 * statistics.fmean(last[task] for task in results.tasks(DETAIL)):.1f}"
            rows.append([arm.name, detail, results.link(line, f"{100 * choosing_mean(line):.1f}")])
    return ["| " + " | ".join(row) + " |" for row in rows]


def pruned_rows(results: Results) -> list[str]:
    """The pruners on the arm that was trained without compression, question by question; beside them trained arms."""
    rows = [["pruner", "tokens, mean over layers", "forward pass, to pooled 1/4", *GROUPS, "mean", "lines"]]
    rows.append(["---"] * len(rows[0]))
    lines = results.by_arm["no compression"]
    for name in lines[0]["pruned"] if lines else ():
        found = [line["pruned"][name] for line in lines]
        tokens = [one["tokens"] for one in found if "tokens" in one]
        groups = [_pruned_mean(found, [t for t in results.tasks(group) if t in found[0]["test"]]) for group in GROUPS]
        rows.append([
            name,
            f"{statistics.fmean(tokens):.1f}" if tokens else str(lines[0]["tokens"]),
            _ratio(results.time("no compression" if name == "none" else name, "forward")),
            *groups,
            _pruned_mean(found, list(found[0]["test"])),
            results.links("no compression"),
        ])  # fmt: skip
    return ["| " + " | ".join(row) + " |" for row in rows]


def _pruned_mean(found: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    if not tasks:
        return "–"
    return str(mean_of([100 * statistics.fmean(one["test"][task] for task in tasks) for one in found]))


def stage_rows(results: Results) -> list[str]:
    """What the decoders read before any arm began, and which ratios were left out for it."""
    rows = [["tokens of", "look-ups right, one cell a token", "look-ups right, such tokens", "arms"], ["---"] * 4]
    for side, reads in results.stages["reads"].items():
        run = reads[side] >= results.level.reads_enough
        rows.append([f"{side} x {side} cells", f"{100 * reads['1']:.1f} %", f"{100 * reads[side]:.1f} %",
                     "run" if run else f"left out: below {100 * results.level.reads_enough:.0f} %"])  # fmt: skip
    return ["| " + " | ".join(row) + " |" for row in rows]


def tuning_rows(results: Results) -> list[str]:
    """Validation accuracy of each interaction at each learning rate."""
    known = {line["key"]: line for line in results.lines}
    rates = [f"rate {factor * results.level.arm.lr:g}" for factor in TUNING_FACTORS]
    rows = [["interaction", *rates], ["---"] * (1 + len(rates))]
    for name in INTERACTION_NAMES:
        lines = [known.get(Job(arm, TUNING_SEED).key(results.level)) for arm in tuning_arms(name, results.level)]
        last = ["–" if line is None else results.link(line, f"{100 * validation_mean(line):.1f}") for line in lines]
        rows.append([INTERACTION_NAMES[name], *last])
    return ["| " + " | ".join(row) + " |" for row in rows]


def written_part(results: Results, longer: Results | None = None) -> str:
    """Everything between the markers of the page.

    Args:
        results: What the tables show.
        longer: The same level with more steps, if it was run.
    """
    versions = results.lines[0]["versions"]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        f"Level `{results.level.name}`, seeds {results.seeds}, {len(results.lines)} lines; {said}.",
        "The encoder named "
        f"{100 * results.stages['encoder']['written_cells']:.1f} % of the written cells before the arms began. "
        "The decoders answered from symbols:",
        "\n".join(stage_rows(results)),
        "## What became of the paper's claims",
        "\n".join(claim_rows(results)),
        "## How much of the loss comes back",
        "\n".join(recovery_rows(results)),
        "## By task",
        "\n".join(task_rows(results)),
    ]
    for suite, title in TITLES.items():
        parts += [f"## {title}", "\n".join(suite_table(results, suite))]
        if suite == "search":
            parts += ["\n".join(search_rows(results))]
        if suite == "rivals":
            parts += ["\n".join(pruned_rows(results))]
        if suite == "table4b":
            parts += ["Validation accuracy by learning rate, from which the rates above were chosen:",
                      "\n".join(tuning_rows(results))]  # fmt: skip
    if longer is not None:
        few = Results(results.path, results.level, seeds=longer.seeds)
        parts += [f"## With {longer.level.arm.steps} steps, seeds {longer.seeds}", "\n".join(longer_rows(few, longer))]
    return "\n\n".join(parts)


def updated(page: str, part: str) -> str:
    """The page with its written part replaced.

    Raises:
        ValueError: a page without the two markers.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r} once each")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    return f"{head}{BEGIN}\n\n{part}\n\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof.report", description=__doc__)
    parser.add_argument("--level", choices=list(LEVELS), default="cpu")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/proof_LEVEL.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "proof.md")
    options = parser.parse_args(arguments)
    path = options.results or ROOT / "benchmarks" / "results" / f"proof_{options.level}.jsonl"
    results = Results(path, LEVELS[options.level])
    more = path.with_name(f"proof_{LONG.name}.jsonl")
    longer = Results(more, LONG) if results.level == CPU and more.exists() else None
    part = written_part(results, longer)
    options.page.write_text(updated(options.page.read_text(encoding="utf-8"), part), encoding="utf-8")
    images = options.page.parent / "images"
    images.mkdir(exist_ok=True)
    for name, figure in (
        ("proof_pareto", pareto_figure(results)),
        ("proof_density", density_figure(results)),
        ("proof_forgetting", forgetting_figure(results)),
    ):
        figure.savefig(images / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
