"""The arms of the suite "patience" with more steps, beside the same seeds with the steps of the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arms import ArmSpec
from .claims import DETAIL
from .markdown import markdown
from .statistics import recovered
from .suites import SUITES, pooled

if TYPE_CHECKING:
    from .results import Results

SUITE = "patience"


def longer_rows(few: Results, many: Results) -> list[str]:
    """Accuracy, and share of the loss that is won back, with few and with many steps.

    Arms that one of the two has not run are left out.

    Args:
        few: The level of the tables, with the seeds that `many` has.
        many: The same with more steps.
    """
    both = (few, many)
    steps = [f"{one.level.arm.steps} steps" for one in both]
    columns = (DETAIL, "won back, %", "mean", "lines")
    header = ["arm", *(f"{column}, {length}" for column in columns for length in steps)]
    rows = []
    for arm in SUITES[SUITE]:
        if all(one.by_arm[arm.name] for one in both):
            details, means = ([str(one.mean(arm.name, group)) for one in both] for group in (DETAIL, None))
            shares = [_won_back(one, arm) for one in both]
            rows.append([arm.name, *details, *shares, *means, *(one.links(arm.name) for one in both)])
    return markdown(header, rows)


def _won_back(results: Results, arm: ArmSpec) -> str:
    """Of what pooling at the arm's ratio loses on OCR & Chart."""
    low, high = (results.by_arm[name] for name in (pooled(arm.ratio).name, "no compression"))
    share = recovered(results.by_arm[arm.name], low, high, results.tasks(DETAIL)) if arm.layers else None
    return "–" if share is None else str(share)
