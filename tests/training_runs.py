"""Short runs of the training scripts, in this process or in one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from examples.train.__main__ import BACKENDS, main

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"

STEPS = 6
SHORT = {
    "max_steps": STEPS,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "use_cpu": True,
}


def flags(backend: str, folder: Path, **options: object) -> list[str]:
    """The command line of a short run of the tiny model."""
    given = {"backend": backend, "config": CONFIGS / "tiny.yaml", "output_dir": folder, **SHORT, **options}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def run(backend: str, folder: Path, **options: object) -> list[float]:
    """Trains in this process; returns the losses."""
    # The libraries keep the device and the number of processes of a first run.
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    return main(flags(backend, folder, **options))


def run_and_kill(backend: str, folder: Path, step: int) -> None:
    """Trains in a process of its own, which is killed (SIGKILL) in the middle of a step."""
    command = [sys.executable, "-m", "tests.training_runs", str(step), *flags(backend, folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights at the end of a run in phase 2, the adapter's twice."""
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {**load_file(folder / "model" / "model.safetensors"), **{f"adapter.{n}": t for n, t in adapter.items()}}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _kill_before(step: int) -> None:
    ordinary, steps = torch.optim.AdamW.step, iter(range(1, step))

    def counted(*args: object, **kwargs: object) -> object:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return ordinary(*args, **kwargs)  # type: ignore[arg-type]

    torch.optim.AdamW.step = counted  # type: ignore[method-assign,assignment]


__all__ = ["BACKENDS", "CONFIGS", "STEPS", "flags", "run", "run_and_kill", "same", "weights"]

if __name__ == "__main__":
    _kill_before(int(sys.argv[1]))
    main(sys.argv[2:])
