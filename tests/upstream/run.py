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

from tests.upstream.compare import problems, stale
from tests.upstream.hosts import HOSTS
from tests.upstream.model_suite import model_tests, run_model_tests
from tests.upstream.outcomes import Outcomes
from tests.upstream.peft_suite import peft_tests, run_peft_tests
from tests.upstream.reviewed import DIFFERENCES, LEFT_OUT

_PEFT_HOSTS = ("llava", "internvl", "qwen3_vl")
"""One that packs nothing, one with tokens shuffled together, one with windows of its own: enough for PEFT."""

_CLASS = re.compile(r"<class '[^']+'>|\b\w+ForConditionalGeneration\b")


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
    unknown = [host for host in hosts if host not in HOSTS]
    if unknown:
        print(f"no host {', '.join(unknown)}; there are {', '.join(HOSTS)}")
        return 2
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(HOSTS)))
