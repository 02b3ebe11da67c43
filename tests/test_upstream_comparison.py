"""The comparison of the upstream tests: nothing unexplained passes, and neither does an explanation of nothing."""

from __future__ import annotations

import unittest

import pytest
import torch

from tests.upstream.attaching import attached_at_birth
from tests.upstream.compare import problems, stale
from tests.upstream.hosts import HOSTS, ModelTester
from tests.upstream.outcomes import Outcome, run_all
from tests.upstream.reviewed import DIFFERENCES, FAIL_ALONE
from vision_remember.adapters.attachment import find_attachment

PASSED, FAILED, SKIPPED = Outcome("passed"), Outcome("failed", "why"), Outcome("skipped", "why")
DIFFERENT = next(iter(DIFFERENCES))
ALONE = next(iter(FAIL_ALONE["llava"]))


@pytest.mark.parametrize(
    ("name", "plain", "attached"),
    [("test", PASSED, PASSED), ("test", SKIPPED, SKIPPED), (DIFFERENT, PASSED, FAILED), (ALONE, FAILED, FAILED)],
)
def test_what_is_equal_or_listed_is_no_problem(name: str, plain: Outcome, attached: Outcome) -> None:
    assert not problems("llava", {name: plain}, {name: attached})


@pytest.mark.parametrize(
    ("name", "plain", "attached"),
    [
        *(("test", PASSED, other) for other in (FAILED, SKIPPED)),
        *(("test", FAILED, other) for other in (FAILED, PASSED)),
        (DIFFERENT, PASSED, PASSED),
        (ALONE, PASSED, PASSED),
    ],
)
def test_what_is_unlisted_or_listed_in_vain_is_a_problem(name: str, plain: Outcome, attached: Outcome) -> None:
    assert problems("llava", {name: plain}, {name: attached})


def test_a_listed_name_that_no_test_has_is_stale() -> None:
    every = dict.fromkeys((*DIFFERENCES, *FAIL_ALONE["llava"]), PASSED)
    assert not stale(["llava"], [every])
    del every[ALONE]
    assert [line.split(":")[0] for line in stale(["llava"], [every])] == [ALONE]


def test_each_end_of_a_test_is_told_apart() -> None:
    class Case(unittest.TestCase):
        def passes(self) -> None: ...

        def fails(self) -> None:
            self.fail("1 is not 2")

        def fails_in_a_part(self) -> None:
            with self.subTest("part"):
                raise ValueError("broken")

        def skips(self) -> None:
            self.skipTest("no use")

        def skips_as_pytest_does(self) -> None:
            pytest.skip("no use")

    outcomes = run_all(Case, [name for name in vars(Case) if not name.startswith("_")])
    statuses = {name: outcome.status for name, outcome in outcomes.items()}
    assert statuses == {
        "passes": "passed",
        "fails": "failed",
        "fails_in_a_part": "failed",
        "skips": "skipped",
        "skips_as_pytest_does": "skipped",
    }
    assert outcomes["fails"].why == "AssertionError: 1 is not 2"
    assert outcomes["skips_as_pytest_does"].why == "no use"


def test_models_are_born_attached_inside_and_only_there(tmp_path: object) -> None:
    model_class, config = HOSTS["llava"].model_class, ModelTester("llava").get_config()
    with attached_at_birth(model_class):
        built = model_class(config)
        built.save_pretrained(tmp_path)
        loaded, _ = model_class.from_pretrained(tmp_path, output_loading_info=True)
        with torch.device("meta"):
            empty = model_class(config)
    assert find_attachment(built) is not None
    assert find_attachment(loaded) is not None
    assert find_attachment(empty) is None
    assert find_attachment(model_class(config)) is None
