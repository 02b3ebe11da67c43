"""Runs test cases one by one and says how each ended."""

from __future__ import annotations

import random
import unittest
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch


@dataclass(frozen=True)
class Outcome:
    """How a test ended.

    Attributes:
        status: "passed", "skipped" or "failed".
        why: the reason of a skip, the last line of a failure's traceback.
    """

    status: str
    why: str = ""


Outcomes = dict[str, Outcome]
"""By the test's name."""


def run_all(case: type[unittest.TestCase], names: Iterable[str]) -> Outcomes:
    """The outcomes of a case's tests by name, each from the same seed."""
    return {name: _run(case(name)) for name in names}


def _run(test: unittest.TestCase) -> Outcome:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    result = _Result()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        test.run(result)
    broken = [*result.failures, *result.errors]
    if broken:
        lines = [line for line in broken[0][1].splitlines() if line and not line.startswith(" ")]
        return Outcome("failed", next((line for line in lines[1:]), lines[0]))
    if result.skipped:
        return Outcome("skipped", result.skipped[0][1])
    return Outcome("passed")


class _Result(unittest.TestResult):
    """Knows skips in pytest's way too."""

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        if issubclass(err[0], pytest.skip.Exception):
            self.addSkip(test, str(err[1]))
        else:
            super().addError(test, err)
