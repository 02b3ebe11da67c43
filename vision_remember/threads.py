"""State that belongs to one thread's run of a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


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
