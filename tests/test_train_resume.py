"""Runs that are cut short: killed, or out of disk at a checkpoint, they go on bit for bit as if nothing had been."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

import vision_remember.adapters.checkpoint as adapter_files
from tests.training_runs import BACKENDS, STEPS, run, run_and_kill, same, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

SOME_SLOW = [
    pytest.param(backend, marks=[] if backend == "loop" else pytest.mark.slow, id=backend) for backend in BACKENDS
]


@pytest.fixture(name="straight", scope="module")
def runs_without_a_break(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Weights and losses of a straight run, by script; each runs once."""
    done: dict[str, Any] = {}

    def of(backend: str) -> Any:
        if backend not in done:
            folder = tmp_path_factory.mktemp(backend)
            done[backend] = run(backend, folder), weights(folder)
        return done[backend]

    return of


@pytest.mark.parametrize("backend", SOME_SLOW)
def test_a_killed_run_goes_on_exactly(backend: str, straight: Any, tmp_path: Path) -> None:
    losses, expected = straight(backend)
    run_and_kill(backend, tmp_path, step=5)
    assert not (tmp_path / "adapter").exists()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    with pytest.raises(ValueError, match=r"holds checkpoint-4: go on with --resume"):
        run(backend, tmp_path)
    assert run(backend, tmp_path, resume=True) == losses
    assert same(weights(tmp_path), expected)


@pytest.mark.parametrize("backend", SOME_SLOW)
def test_a_full_disk_at_a_checkpoint_leaves_the_last_good_one(
    backend: str, straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, expected = straight(backend)
    write, written = adapter_files.save_file, []

    def full(tensors: Any, file: Path, **options: Any) -> None:
        written.append(file)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, file, **options)

    with monkeypatch.context() as patched:
        patched.setattr(adapter_files, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            run(backend, tmp_path)
    assert len(written) == 2
    assert not list(tmp_path.rglob(".saving*"))
    assert run(backend, tmp_path, resume=True) == losses
    assert same(weights(tmp_path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_cannot_be_written_leave_the_last_good_checkpoint(
    backend: str, straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, but the disk is full before the adapter's turn: in the middle of the optimiser's state."""
    losses, expected = straight(backend)
    write, failed = torch.save, []

    def full(value: Any, file: Any, *args: Any, **options: Any) -> None:
        write(value, file, *args, **options)
        if "optimizer" in str(file) and (failed or len(list(tmp_path.glob("checkpoint-*/optimizer*"))) == 2 - saving):
            failed.append(file)
            Path(file).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

    saving = 1 if backend == "loop" else 0  # the loop's own is in a folder aside
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run(backend, tmp_path)
    assert failed
    assert run(backend, tmp_path, resume=True) == losses
    assert same(weights(tmp_path), expected)


def test_the_random_numbers_matter(straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would not notice a run that goes on with others."""
    _, expected = straight("loop")
    kept = torch.random.get_rng_state()
    calls = []

    def reseeded(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == STEPS // 2:
            torch.manual_seed(7)
        return ordinary(*args, **kwargs)

    ordinary = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", reseeded)
    run("loop", tmp_path)
    torch.random.set_rng_state(kept)
    assert not same(weights(tmp_path), expected)
