"""Compares what happened on a plain and on an attached host with what was reviewed."""

from __future__ import annotations

from tests.upstream.outcomes import Outcomes
from tests.upstream.reviewed import DIFFERENCES, FAIL_ALONE


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


def stale(hosts: list[str], plains: list[Outcomes]) -> list[str]:
    """Names in ``reviewed.py`` that no test has."""
    known = {name for plain in plains for name in plain}
    listed = {*DIFFERENCES, *(name for host in hosts for name in FAIL_ALONE.get(host, {}))}
    return [f"{name}: listed, but there is no such test" for name in sorted(listed - known)]
