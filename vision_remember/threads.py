"""State that belongs to one thread's run of a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Switchable:
    """Something that can be switched off for a while; the whiles of several threads may overlap."""

    # Of the class: copies and pickles need no lock of their own.
    _lock = threading.Lock()
    _switched_off = 0

    @property
    def enabled(self) -> bool:
        """Whether nobody has switched it off."""
        return self._switched_off == 0

    def switch_off(self, times: int = 1) -> None:
        """Counts how often it is off; a negative number takes back as many."""
        with self._lock:
            self._switched_off += times

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the ``with`` it is off, for every thread."""
        self.switch_off()
        try:
            yield
        finally:
            self.switch_off(-1)


class RunStack(Generic[T]):
    """The values of the runs under way in the current thread; hooks ask for the innermost.

    A ``threading.local``, not a context variable: compiled code can trace it. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @contextmanager
    def running(self, value: T) -> Iterator[T]:
        """Inside the ``with``, ``value`` is the innermost of this thread."""
        self.push(value)
        try:
            yield value
        finally:
            self.pop()

    def push(self, value: T) -> None:
        """Begins a run that the matching :meth:`pop` ends."""
        self._values().append(value)

    def pop(self) -> None:
        """Ends the innermost run; nothing happens outside any."""
        if values := self._values():
            values.pop()

    def innermost(self) -> T | None:
        """The value of the innermost run of this thread, None outside any."""
        values = self._values()
        return values[-1] if values else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def _values(self) -> list[T]:
        if not hasattr(self._local, "values"):
            self._local.values = []
        return self._local.values
