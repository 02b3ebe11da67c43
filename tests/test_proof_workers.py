"""The processes of the proof: what they start with, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.proof.workers import LARGE_PAGES, TUNABLES, workers

ENDLESS = """
import sys
from dataclasses import replace
from pathlib import Path
from benchmarks.proof.levels import TINY
from benchmarks.proof.runner import run_suites

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    level = replace(TINY, tasks=("characters",), encoder=replace(TINY.encoder, steps=10**9))
    run_suites(["controls"], [0], level, folder / "cache", folder / "lines.jsonl", 2)
"""
PATIENCE = 120
"""Seconds before a wait fails."""


def test_a_run_that_is_terminated_leaves_no_process_behind(tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    root = Path(__file__).parents[1]
    run = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        # then nothing but the encoder is left to make
        wait_until(lambda: all(any((tmp_path / "cache").glob(f"{kept}*")) for kept in ("pages-test", "decoder")))
        assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        assert run.wait(PATIENCE) == 128 + signal.SIGTERM
        wait_until(lambda: not lives(run.pid))
    finally:
        if lives(run.pid):
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def test_processes_take_large_pages_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for own, expected in ((None, LARGE_PAGES), ("glibc.malloc.check=0", "glibc.malloc.check=0")):
        if own is None:
            monkeypatch.delenv(TUNABLES, raising=False)
        else:
            monkeypatch.setenv(TUNABLES, own)
        with workers(1) as pool:
            assert pool.submit(os.getenv, TUNABLES).result() == expected
        assert os.environ.get(TUNABLES) == own


def lives(group: int) -> bool:
    """Whether a process of the group runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
