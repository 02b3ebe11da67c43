"""Runs the common model tests of transformers and PEFT on hosts, plain and with Vision Remember, and compares.

    make test-upstream
    python -m tests.upstream.run internvl    # only this host

Both ship them in their source distributions. What passes on the plain host must pass on the attached one. Exceptions
stand in ``reviewed.py``. Needs the package ``parameterized``, and a network for the first run.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version

# Before transformers is imported: no test may fetch a model.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}

from transformers.utils import logging

from tests.upstream.hosts import HOSTS
from tests.upstream.model_suite import model_tests, run_model_tests
from tests.upstream.outcomes import Outcome
from tests.upstream.peft_suite import peft_tests, run_peft_tests
from tests.upstream.reviewed import DIFFERENCES, FAIL_ALONE, LEFT_OUT

_PEFT_HOSTS = ("llava", "internvl", "qwen3_vl")
"""One that packs nothing, one with tokens shuffled together, one with windows of its own: enough for PEFT."""

_CLASS = re.compile(r"<class '[^']+'>|\b\w+ForConditionalGeneration\b")
Outcomes = dict[str, Outcome]


def problems(host: str, plain: Outcomes, attached: Outcomes) -> list[str]:
    """Everything about a host that ``reviewed.py`` does not explain, and what it explains in vain."""
    found = []
    alone = FAIL_ALONE.get(host, {})
    for name, before in plain.items():
        after = attached[name]
        if (before.status == "failed") != (name in alone):
            listed = "listed" if name in alone else "not listed"
            found.append(f"{name}: {before.status} on the plain host, {listed}: {before.why}")
        if (before.status != after.status) != (name in DIFFERENCES):
            listed = "listed" if name in DIFFERENCES else "not listed"
            found.append(f"{name}: {before.status} -> {after.status}, {listed}: {after.why}")
    return found


def counts(outcomes: Outcomes) -> str:
    """As in "108 passed, 48 skipped"."""
    tally = Counter(outcome.status for outcome in outcomes.values())
    return ", ".join(f"{tally[status]} {status}" for status in ("passed", "skipped", "failed"))


def skips(outcomes: Iterable[Outcomes]) -> Counter[str]:
    """How often each reason was given for a skip."""
    reasons = (o.why.strip() for all_of in outcomes for o in all_of.values() if o.status == "skipped")
    return Counter(_CLASS.sub("the class", reason) for reason in reasons)


def main(hosts: list[str]) -> int:
    """The exit status: 1 if anything is unexplained."""
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    print(f"transformers {version('transformers')}, peft {version('peft')}, torch {version('torch')}\n")
    print(f"{'host':<24}{'plain':<36}with Vision Remember")
    models, adapters = model_tests(), peft_tests()
    runs: list[tuple[str, Callable[[bool], Outcomes]]] = []
    for host in hosts:
        runs.append((host, lambda on, host=host: run_model_tests(models, host, attached=on)))  # type: ignore[misc]
        if host in _PEFT_HOSTS:
            runs.append((f"{host} PEFT", lambda on, host=host: run_peft_tests(adapters, host, attached=on)))  # type: ignore[misc]
    plains, unexplained = [], []
    for title, run in runs:
        plain, attached = run(False), run(True)
        print(f"{title:<24}{counts(plain):<36}{counts(attached)}", flush=True)
        plains.append(plain)
        unexplained += [f"{title}: {problem}" for problem in problems(title.split()[0], plain, attached)]
    for heading, listed in (("Differs", DIFFERENCES), ("Not run", LEFT_OUT)):
        print(f"\n{heading}:", *(f"{name}: {why}" for name, why in listed.items()), sep="\n  ")
    print("\nSkipped on plain hosts too:", *(f"{n:4} {why}" for why, n in skips(plains).most_common()), sep="\n  ")
    unexplained += stale(hosts, plains)
    if unexplained:
        print("\nUnexplained:", *unexplained, sep="\n  ")
    return int(bool(unexplained))


def stale(hosts: list[str], plains: list[Outcomes]) -> list[str]:
    """Names in ``reviewed.py`` that no test has."""
    known = {name for plain in plains for name in plain}
    listed = {*DIFFERENCES, *(name for host in hosts for name in FAIL_ALONE.get(host, {}))}
    return [f"{name}: listed, but there is no such test" for name in sorted(listed - known)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(HOSTS)))
