"""The examples of docs/analysis.md run as they stand, and show what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.hosts import batch, build_llava
from tests.processors import llava_processor

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "analysis.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
SHOWN: dict[str, Any] = {
    "found": lambda found: found.vision.shape == (4, 3, 4) and found.per_layer().isfinite().all(),
    "before": lambda before: before.shape == (4,),
    "overlay": lambda overlay: overlay.shape == (336, 336),
    "looks": lambda looks: torch.allclose(looks.in_region(0, 2, 3).sum((1, 2)), torch.ones(1)),
    "curve": lambda curve: torch.equal(curve.remembered, curve.plain) and len(curve.plain) == 5,
    "report": lambda report: (
        report.change == 0 and report.answer == report.plain_answer and Path("report.html").exists()
    ),
}


def test_every_example_is_checked() -> None:
    assert len(EXAMPLES) == len(SHOWN)


@pytest.mark.parametrize(("code", "shown"), list(zip(EXAMPLES, SHOWN, strict=True)), ids=SHOWN)
def test_an_example_runs_and_shows_what_it_says(
    code: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = build_llava()
    names: dict[str, Any] = {"model": model, "inputs": batch(model)}
    names |= {"processor": llava_processor("clip", 32, 4), "picture": Image.new("RGB", (40, 32), "red")}
    exec(compile(code, "docs/analysis.md", "exec"), names)
    assert SHOWN[shown](names[shown])
