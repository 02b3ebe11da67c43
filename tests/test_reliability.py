"""A long run leaves nothing behind; the page on reliability says what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import reliability

ROOT = Path(__file__).resolve().parents[1]
MEASURED = json.loads((ROOT / "benchmarks" / "results" / "reliability.json").read_text())


def test_nothing_is_kept_from_call_to_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept image, or a hook of a call, would be at least one object a call."""
    monkeypatch.setattr(reliability, "_WARM_UP", 10)
    found = reliability.main(["--calls", "30", "--output", str(tmp_path / "new" / "found.json")])
    assert json.loads((tmp_path / "new" / "found.json").read_text()) == found
    for name in ("plain", "attached"):
        before, after = found[name]["before"], found[name]["after"]
        assert (before["calls"], after["calls"]) == (10, 40)
        assert after["tensors"] == before["tensors"]
        assert abs(after["objects"] - before["objects"]) < 30
    assert found["attached"]["before"]["tensors"] > found["plain"]["before"]["tensors"]  # the blocks are there


def test_what_is_kept_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "_WARM_UP", 2)
    model, kept = reliability.small_llava(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: kept.append(kwargs), with_kwargs=True)
    before, after = reliability.long_run(model, 4)
    assert after.tensors >= before.tensors + 4
    assert after.objects >= before.objects + 4


def test_the_page_shows_what_was_measured() -> None:
    rows = re.findall(
        r"^\| (plain|with) .*?\| (.*) \| (.*) \| (.*) \|$", (ROOT / "docs/reliability.md").read_text(), re.M
    )
    assert len(rows) == 2
    for (kind, *shown), name in zip(rows, ("plain", "attached"), strict=True):
        assert (kind == "plain") == (name == "plain")
        before, after = MEASURED[name]["before"], MEASURED[name]["after"]
        for text, key in zip(shown, ("resident_mib", "tensors", "objects"), strict=True):
            assert text == f"{before[key]:,} → {after[key]:,}"
    assert (MEASURED["calls"], MEASURED["plain"]["before"]["calls"]) == (1000, 100)
