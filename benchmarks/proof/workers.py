"""The processes of a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the run. Where it is terminated, they would train on for nobody to write it down."""
    in_main = threading.current_thread() is threading.main_thread()  # elsewhere no signal arrives
    before = signal.signal(signal.SIGTERM, _end) if in_main else None
    try:
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            yield pool
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: Any) -> None:
    for child in active_children():
        child.terminate()
    raise SystemExit(128 + number)
