"""The versions that are supported, and a warning outside of them."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Supported versions of a library.

    Attributes:
        name: of its distribution.
        oldest: the first that is supported, complete.
        newest: the last that was tested; its later corrections count as the same.
    """

    name: str
    oldest: str
    newest: str

    def holds(self, version: str) -> bool:
        """Whether a version lies inside."""
        return _numbers(self.oldest) <= _numbers(version) and _numbers(version)[:2] <= _numbers(self.newest)[:2]


WINDOWS = (Window("transformers", "5.20.2", "5.24.0"), Window("torch", "2.6", "2.13.0"))


@functools.cache
def warn_outside_the_windows() -> None:
    """Warns, the first time, of installed versions outside; blames who called the caller."""
    for window in WINDOWS:
        version = importlib.metadata.version(window.name)
        if not window.holds(version):
            warnings.warn(
                f"vision-remember supports {window.name} {window.oldest} to {window.newest}, and this is "
                f"{version}: install one of those if anything goes wrong",
                stacklevel=3,
            )


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
