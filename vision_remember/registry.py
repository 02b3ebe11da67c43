"""The one kind of table that every plug of the library is listed in."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def did_you_mean(name: str, known: Mapping[str, object] | list[str]) -> str:
    """A hint for an error message: the closest known name, if any, and all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(map(repr, names))}"


class Registry(Mapping[str, T]):
    """A read-only table from names to plugs, with helpful errors for unknown names.

    Args:
        kind: what the table lists, for messages ("interaction", "projector", ...).
        entries: the table.
    """

    def __init__(self, kind: str, entries: Mapping[str, T]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            ValueError: no entry has that name; the message suggests the closest one.
        """
        # ValueError, not KeyError: a KeyError prints its message as a quoted repr, and the name came from a user.
        if name not in self._entries:
            raise ValueError(f"unknown {self.kind} {name!r}: {did_you_mean(str(name), self._entries)}")
        return self._entries[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The entry called ``name``, or ``default``."""
        return self._entries.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
