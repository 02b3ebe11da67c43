"""Means, intervals and paired tests over runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy import stats

Verdict = Literal["holds", "does not hold", "the opposite holds", "undecided"]
Lines = Sequence[Mapping[str, Any]]
_ALPHA = 0.05
_ROUNDING = 1e-6  # points


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval.

    Attributes:
        value: The mean.
        half: Half the width of Student's interval; None of a single value.
    """

    value: float
    half: float | None

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, sign: str) -> str:
        """With one digit; "+" shows the sign of a gain as well."""
        value = f"{self.value:{sign}.1f}"
        return value if self.half is None else f"{value} ± {self.half:.1f}"


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and 95 % interval of independent values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Mean(mean, None)
    error = statistics.stdev(values) / len(values) ** 0.5
    return Mean(mean, float(stats.t.ppf(1 - _ALPHA / 2, len(values) - 1)) * error)


@dataclass(frozen=True)
class Comparison:
    """One arm against another on the same seeds and tasks.

    Attributes:
        difference: In points: the mean over tasks, averaged over seeds.
        p: Of a two-sided paired t-test over seeds; None of a single seed, and where all seeds differ alike.
        margin: Points that the first arm may lose and still be called no worse; the test is against that loss then.
    """

    difference: Mean
    p: float | None
    margin: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Of the claim that the first arm is better, or no worse."""
        difference = self.difference.value
        if self.p is None:
            if self.difference.half is None or abs(difference) >= _ROUNDING:
                return "undecided"
            return "holds" if self.margin else "does not hold"
        if self.p >= _ALPHA:
            return "undecided"
        return "holds" if difference > -self.margin else "the opposite holds"


def compared(better: Lines, worse: Lines, tasks: Sequence[str], margin: float | None = None) -> Comparison:
    """Pairs the runs of two arms by seed.

    Tasks are averaged first: which ones there are is no matter of chance, and they differ by far more than seeds do.

    Args:
        better: Lines of the arm that is claimed to be better.
        worse: Lines of the other.
        tasks: Whose accuracies count.
        margin: Points that the first may lose and still be no worse; None where it has to be better.

    Raises:
        ValueError: no seed that both have.
    """
    ours, theirs = (
        {line["seed"]: 100 * statistics.fmean(line["test"][task] for task in tasks) for line in arm}
        for arm in (better, worse)
    )
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError(f"seeds {sorted(ours)} and {sorted(theirs)}: expected one that both arms have")
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    # Differences that are equal up to rounding have no spread to test against.
    equal = max(differences) - min(differences) < _ROUNDING
    lost = margin or 0.0
    p = None if equal else float(stats.ttest_1samp(differences, -lost).pvalue)
    return Comparison(mean_of(differences), p, lost)


def recovered(lines: Lines, pooled: Lines, whole: Lines, tasks: Sequence[str]) -> Mean | None:
    """Share of what pooling loses on some tasks that an arm wins back, in per cent, over the seeds that all have.

    None where they have no seed in common, or where pooling loses nothing in one.

    Args:
        lines: The arm's.
        pooled: Those of pooling alone.
        whole: Those without compression.
        tasks: Over which accuracies are averaged.
    """
    mine, low, high = (
        {line["seed"]: statistics.fmean(line["test"][task] for task in tasks) for line in arm}
        for arm in (lines, pooled, whole)
    )
    seeds = sorted(mine.keys() & low.keys() & high.keys())
    if not seeds or any(high[seed] == low[seed] for seed in seeds):
        return None
    return mean_of([100 * (mine[seed] - low[seed]) / (high[seed] - low[seed]) for seed in seeds])
