"""The page of hosts: its rows are what the script makes of the mapping and the library today."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.zoo import CLASSES, NEEDS_TIMM, REFUSED, SUPPORTED

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCRIPT: dict[str, Any] = runpy.run_path(str(DOCS / "make_host_table.py"))
PAGE = (DOCS / "hosts.md").read_text(encoding="utf-8")


def rows(title: str) -> dict[str, str]:
    """The rows under a title, by model type."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `\w+` \| `([\w.-]+)` \| (.*) \|$", section, re.MULTILINE))


# Each version of transformers maps other classes.
of_these_versions = pytest.mark.skipif(SCRIPT["versions"]() not in PAGE, reason="the page is about other versions")


@pytest.mark.slow
@of_these_versions
def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert SCRIPT["main"](["--check"]) == 0, capsys.readouterr().err


@of_these_versions
def test_every_class_has_its_row() -> None:
    assert list(rows("Supported")) == list(SUPPORTED)
    assert list(rows("Not supported")) == list(REFUSED)
    counts = f"Of {len(CLASSES)} model types ({len(set(CLASSES.values()))} classes) {len(SUPPORTED)} are supported"
    assert counts in PAGE
    assert all(f"`{CLASSES[name]}`" in PAGE for name in NEEDS_TIMM)


@of_these_versions
def test_the_readme_lists_the_same_hosts() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert SCRIPT["updated"](readme, SCRIPT["readme_list"]()) == readme


def test_no_supported_host_fails_a_check() -> None:
    assert "all but" not in PAGE


def test_every_refusal_on_the_page_is_the_one_that_is_tested() -> None:
    for model_type, said in rows("Not supported").items():
        assert re.search(REFUSED[model_type], said)


@pytest.mark.parametrize("model_type", ["mistral3", "mllama"])
def test_rows_are_made_by_trying(model_type: str) -> None:
    kind, section = ("supported", "Supported") if model_type in SUPPORTED else ("refused", "Not supported")
    assert " | ".join(SCRIPT[f"{kind}_row"](model_type)[2:]) == rows(section)[model_type]


def test_a_page_without_its_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected the lines"):
        SCRIPT["updated"]("# Hosts", "")
