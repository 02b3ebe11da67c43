"""The page of projectors: its tables are what the script makes of the registry today."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from vision_remember import PROJECTORS

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCRIPT: dict[str, Any] = runpy.run_path(str(DOCS / "make_projector_table.py"))


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert SCRIPT["main"](["--check"]) == 0, capsys.readouterr().err


def test_a_changed_table_is_noticed_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    committed = (DOCS / "projectors.md").read_text(encoding="utf-8")
    page = tmp_path / "projectors.md"
    page.write_text(committed.replace("| `token_packer` | 144 |", "| `token_packer` | 145 |"), encoding="utf-8")
    assert SCRIPT["main"](["--check"], page=page) == 1
    assert "run python docs/make_projector_table.py" in capsys.readouterr().err
    assert SCRIPT["main"]([], page=page) == 0
    assert page.read_text(encoding="utf-8") == committed


def test_a_page_without_its_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected the lines"):
        SCRIPT["updated"]("# Projectors")


def test_sources_cover_the_registry_and_nothing_else() -> None:
    assert set(SCRIPT["SOURCES"]) == set(PROJECTORS)
    with pytest.raises(ValueError, match=r"lacks \['new'\] and has \['stf'\]"):
        SCRIPT["check_sources"]([*(PROJECTORS.keys() - {"stf"}), "new"])


def test_the_script_finds_out_what_a_projector_refuses() -> None:
    assert SCRIPT["served"]("pixel_shuffle", (24, 24)) == "12x12"
    assert SCRIPT["served"]("pixel_shuffle", (27, 27)) == "14x14, with `fit`"
    keeps = SCRIPT["on_meta"]("pixel_shuffle", 896)
    assert SCRIPT["token_grid"](keeps, (27, 27)) is None
