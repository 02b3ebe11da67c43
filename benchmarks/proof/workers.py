"""The processes of a run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any

TUNABLES = "GLIBC_TUNABLES"
LARGE_PAGES = "glibc.malloc.hugetlb=1"
"""Large pages of memory for tensors: a step takes a twentieth less time, and computes the same. Read by glibc alone."""


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the run. Where it is terminated, they would train on for nobody to write it down."""
    in_main = threading.current_thread() is threading.main_thread()  # elsewhere no signal arrives
    before = signal.signal(signal.SIGTERM, _end) if in_main else None
    chosen = os.environ.get(TUNABLES)
    os.environ.setdefault(TUNABLES, LARGE_PAGES)  # a process reads it as it starts
    try:
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            yield pool
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
        if chosen is None:
            del os.environ[TUNABLES]


def _end(number: int, frame: Any) -> None:
    for child in active_children():
        child.terminate()
    raise SystemExit(128 + number)
