"""The tables of the report, as rows of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.paper_tables import GROUPS, TABLE_2, TABLE_4, TABLE_5A, group_averages

from .arms import ArmSpec
from .claims import CLAIMS, DETAIL, Claim
from .markdown import markdown
from .results import Results
from .runner import choosing_mean, validation_mean
from .statistics import compared, mean_of, recovered
from .suites import INTERACTION_NAMES, RATIOS, SALIENCIES, SEARCHED, TUNING_FACTORS, interaction_arm, rate_arms

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


def suite_table(results: Results, suite: str) -> list[str]:
    """A suite's arms: ours by group, the paper's beside."""
    header = [
        "arm",
        "tokens",
        "added parameters",
        "prefill",
        *GROUPS,
        "mean",
        f"paper: {', '.join(GROUPS)}",
        "paper: mean",
        "lines",
    ]
    rows = []
    for arm in results.suites[suite]:
        lines = results.by_arm[arm.name]
        if not lines:
            continue
        name = arm.name
        if suite == "table4b":
            name += f" (rate {arm.lr or results.level.arm.lr:g})"
        groups = [str(results.mean(arm.name, group)) if results.tasks(group) else "–" for group in GROUPS]
        added = f"{lines[0]['parameters']['blocks']:,}"
        rows.append([name, str(lines[0]["tokens"]), added, _ratio(results.time(arm.name, "prefill")), *groups,
                     str(results.mean(arm.name)), *paper_scores(suite, arm.name), results.links(arm.name)])  # fmt: skip
    return markdown(header, rows)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def paper_scores(suite: str, arm: str) -> tuple[str, str]:
    """What the paper prints for an arm: the groups and the mean; "–" where it prints nothing."""
    if suite in ("table4a", "table4b", "table4c") and arm in _PAPER_4:
        row = next(row for row in TABLE_4 if (row.table, row.label) == _PAPER_4[arm])
        return _listed(row.groups), f"{row.average:.1f}"
    plain = arm.removesuffix(" + VR")
    if suite == "table2" and plain in _PAPER_2:
        printed = next(row for row in TABLE_2 if row.label == _PAPER_2[plain] and row.remember == (plain != arm))
        return _listed(group_averages(printed.scores)), f"{printed.average:.1f}"
    if suite == "table5a" and arm in _PAPER_5A:
        budget = next(row for row in TABLE_5A if row.label == _PAPER_5A[arm])
        return "–", f"{budget.average:.1f}"
    return "–", "–"


def _listed(groups: Mapping[str, float]) -> str:
    return ", ".join(f"{groups[group]:.1f}" if group in groups else "–" for group in GROUPS)


def claim_rows(results: Results) -> list[str]:
    """Each claim whose arms were run: what the paper says, what the runs say."""
    header, rows = ["claim", "paper", "compared", "difference, points", "p", "here"], []
    for claim in CLAIMS:
        if results.by_arm[claim.better] and results.by_arm[claim.worse] and results.tasks(claim.on):
            rows.append(_claim_row(results, claim))
    return markdown(header, rows)


def _claim_row(results: Results, claim: Claim) -> list[str]:
    better, worse = results.by_arm[claim.better], results.by_arm[claim.worse]
    found = compared(better, worse, results.tasks(claim.on), claim.margin)
    on = f" ({claim.on})" if claim.on else ""
    sides = f"{claim.better} {results.links(claim.better)} − {claim.worse} {results.links(claim.worse)}{on}"
    p = "–" if found.p is None else f"{found.p:.2g}"
    return [claim.text, claim.where, sides, f"{found.difference:+}", p, found.verdict]


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
    rows = []
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
    return markdown(header, rows)


def task_rows(results: Results) -> list[str]:
    """Accuracy by task of the arms that everything is about."""
    arms = [
        "no compression",
        "pooled 1/4",
        "pooled 1/4 + VR",
        "1/4: saliency that takes nothing away",
        "pooled + MLP of equal parameters",
        "saliency alone",
        "the paper as printed",
    ]
    arms = [arm for arm in arms if results.by_arm[arm]]
    header, rows = ["task", "group", *arms], []
    for task, group in results.groups.items():
        cells = [mean_of([100 * line["test"][task] for line in results.by_arm[arm]]) for arm in arms]
        rows.append([f"`{task}`", group, *map(str, cells)])
    return markdown(header, rows)


def search_rows(results: Results) -> list[str]:
    """Validation accuracy of everything that was tried for the default, on the seed that is for choices."""
    header, rows = ["tried", f"validation, {DETAIL}", "validation, the other groups, which choose"], []
    for arm in SEARCHED:
        line = results.tried(arm)
        if line is not None:
            last = line["curve"]["validation"][-1]
            detail = f"{100 * statistics.fmean(last[task] for task in results.tasks(DETAIL)):.1f}"
            rows.append([arm.name, detail, results.link(line, f"{100 * choosing_mean(line):.1f}")])
    return markdown(header, rows)


def pruned_rows(results: Results) -> list[str]:
    """The pruners on the arm that was trained without compression, question by question; beside them trained arms."""
    header = ["pruner", "tokens, mean over layers", "forward pass, to pooled 1/4", *GROUPS, "mean", "lines"]
    rows = []
    lines = results.pruned()
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
            results.links_to(lines),
        ])  # fmt: skip
    return markdown(header, rows)


def _pruned_mean(found: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    if not tasks:
        return "–"
    return str(mean_of([100 * statistics.fmean(one["test"][task] for task in tasks) for one in found]))


def stage_rows(results: Results) -> list[str]:
    """What the decoders read before any arm began, and which ratios were left out for it."""
    header, rows = ["tokens of", "look-ups right, one cell a token", "look-ups right, such tokens", "arms"], []
    for side, reads in results.stages["reads"].items():
        run = reads[side] >= results.level.reads_enough
        rows.append([f"{side} x {side} cells", f"{100 * reads['1']:.1f} %", f"{100 * reads[side]:.1f} %",
                     "run" if run else f"left out: below {100 * results.level.reads_enough:.0f} %"])  # fmt: skip
    return markdown(header, rows)


def tuning_rows(results: Results) -> list[str]:
    """Validation accuracy of each interaction at each learning rate, by which one was chosen."""
    rates = [f"rate {factor * results.level.arm.lr:g}" for factor in TUNING_FACTORS]
    return _tried_rows(results, rates, lambda name: rate_arms(interaction_arm(name), results.level))


def interaction_rows(results: Results) -> list[str]:
    """Validation accuracy of each interaction with each saliency, at the rate of the other tables."""
    return _tried_rows(results, list(SALIENCIES), lambda name: [interaction_arm(name, each) for each in SALIENCIES])


def _tried_rows(results: Results, columns: Sequence[str], arms_of: Callable[[str], Sequence[ArmSpec]]) -> list[str]:
    """A row for every interaction of which all arms have been tried."""
    rows = []
    for name, title in INTERACTION_NAMES.items():
        lines = [results.tried(arm) for arm in arms_of(name)]
        if all(lines):
            rows.append([title, *(results.link(line, f"{100 * validation_mean(line):.1f}") for line in lines if line)])
    return markdown(["interaction", *columns], rows)
