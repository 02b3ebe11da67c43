"""Everything here runs without a network: an attempt to reach one is an error."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Any:
    def refuse(self: Any, address: Any) -> None:
        raise AssertionError(f"a test reached for the network: {address}")

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", refuse)
    yield
    patch.undo()
