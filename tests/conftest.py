"""Settings of all tests."""

from __future__ import annotations

import pytest
import torch

# The models are too small for several threads to help, and the tests themselves run side by side.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)
