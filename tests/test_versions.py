"""The window of supported versions: what pyproject.toml and the constraints say of it, and the warning outside."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.fingerprint import Fingerprint
from tests.hosts import build_llava
from vision_remember import attach_vision_remember, detach_vision_remember
from vision_remember.adapters.versions import WINDOWS, Window, warn_outside_the_windows

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
every_window = pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.name)


def requirements(lines: list[str], name: str) -> list[Requirement]:
    """Those among the lines that concern a library."""
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [requirement for requirement in parsed if requirement.name == name]


@every_window
def test_the_project_accepts_the_window_and_nothing_older(window: Window) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = requirements(project["dependencies"], window.name)
    assert requirement.marker is None
    bounds = {part.operator: part.version for part in requirement.specifier}
    assert bounds[">="] == window.oldest
    assert requirement.specifier.contains(window.newest)


@every_window
def test_development_uses_versions_of_the_window(window: Window) -> None:
    pins = requirements((ROOT / "constraints.txt").read_text().splitlines(), window.name)
    versions = [part.version for pin in pins for part in pin.specifier]
    assert versions
    assert all(window.holds(version) for version in versions)


@pytest.mark.parametrize(
    ("version", "inside"),
    [("5.20.1", False), ("5.20.2", True), ("5.21.0", True), ("5.23.0+cpu", True), ("5.23.4", True), ("5.24.0", False)],
)
def test_corrections_of_the_newest_are_inside(version: str, inside: bool) -> None:
    assert Window("transformers", "5.20.2", "5.23.0").holds(version) == inside


@pytest.fixture(name="installed")
def other_versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Versions to report in place of the installed ones, in a process that has not attached yet."""
    versions: dict[str, str] = {}
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    warn_outside_the_windows.cache_clear()
    yield versions
    warn_outside_the_windows.cache_clear()


@every_window
def test_the_first_attach_outside_the_window_warns_once(window: Window, installed: dict[str, str]) -> None:
    installed[window.name] = "99.0"
    model = build_llava()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        attach_vision_remember(model, [1])
        detach_vision_remember(model)
        attach_vision_remember(model, [1])
    assert [warning.filename for warning in seen] == [__file__]
    assert f"{window.name} {window.oldest} to {window.newest}, and this is 99.0" in str(seen[0].message)


def test_no_warning_inside_the_window(installed: dict[str, str]) -> None:
    installed |= {window.name: window.oldest for window in WINDOWS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_vision_remember(build_llava(), [1])


def test_who_turns_the_warning_into_an_error_keeps_the_host_as_it_was(installed: dict[str, Any]) -> None:
    installed["transformers"] = "99.0"
    model = build_llava()
    before = Fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="supports transformers"):
            attach_vision_remember(model, [1])
    before.check(model)
