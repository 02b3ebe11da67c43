"""Settings of all tests."""

from __future__ import annotations

import pytest
import torch

from vision_remember.ops import triton_support

# The models are too small for several threads to help, and the tests themselves run side by side.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _gpus_that_are_not_there_run_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever compilers and Triton this machine has, which nothing asks of a fake device."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton_support, "_USABLE", True)
