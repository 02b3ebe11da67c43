"""The arms of the suite "patience" with more steps, beside the same seeds with the steps of the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .claims import DETAIL

if TYPE_CHECKING:
    from .report import Results

SUITE = "patience"


def longer_rows(few: Results, many: Results) -> list[str]:
    """Accuracy with few and with many steps; arms that one of the two has not run are left out.

    Args:
        few: The level of the tables, of the seeds that `many` has.
        many: The same with more steps.
    """
    both = (few, many)
    steps = [f"{one.level.arm.steps} steps" for one in both]
    header = ["arm", *(f"{what}, {length}" for what in (DETAIL, "mean", "lines") for length in steps)]
    rows = [header, ["---"] * len(header)]
    for arm in (arm.name for arm in many.suites[SUITE]):
        if all(one.by_arm[arm] for one in both):
            means = [str(one.mean(arm, group)) for group in (DETAIL, None) for one in both]
            rows.append([arm, *means, *(one.links(arm) for one in both)])
    return ["| " + " | ".join(row) + " |" for row in rows]
