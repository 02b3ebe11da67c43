"""The examples of docs/pruning.md run as they stand, and its tables name what there is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from tests.hosts import batch, build_llava
from vision_remember import PRUNERS, attach_pruner
from vision_remember.adapters.decoder_queries import READABLE
from vision_remember.adapters.pruner import CUTTABLE

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "pruning.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def run(code: str) -> dict[str, Any]:
    model = build_llava()
    names: dict[str, Any] = {"model": model, "inputs": batch(model)}
    exec(compile(code, "docs/pruning.md", "exec"), names)
    return names


def test_the_examples_run() -> None:
    first, second = EXAMPLES
    names = run(first)
    assert names["counts"].tolist() == [[64, 128, 0]] * 2 + [[32, 64, 0]] * 2
    plain = build_llava()
    assert torch.equal(names["whole"], plain(**batch(plain)).logits)
    assert torch.equal(names["model"](**names["inputs"]).logits, names["whole"])
    found = run(second)["found"]
    assert list(found) == list(PRUNERS)
    assert all(0 < counts[0] < 64 and counts[2] == 0 for counts in found.values())


def test_the_page_names_every_method_and_option() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    for name, cls in PRUNERS.items():
        row = next(line for line in rows if f"`{name}`" in line.split("|")[1])
        for field in dataclasses.fields(cls):
            # Controls share a row, and so do the two kinds of PruMerge.
            assert f"`{field.name}=" in row or name == "prumerge_plus", (name, field.name)
            if f"`{field.name}=" in row and field.default is not None:
                assert f"`{field.name}={field.default!r}`" in row, (name, field.name)


def test_the_page_names_every_decoder() -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith("| decoders"))
    every, readable = row.lower().replace("-", "").split("those that read")
    plain = [name for name in CUTTABLE if not name.endswith("_text")]
    assert all(name in every for name in plain)
    assert all(name in readable for name in READABLE if name in plain)
    names = re.findall(r"cohere|llama|mistral|phi3|phi|qwen2vl|qwen2.5vl|qwen2|qwen3|smollm3", every)
    assert len(names) == len(CUTTABLE)


def test_printing_does_not_need_a_pass() -> None:
    for name in PRUNERS:
        options = {"dominant": 5, "contextual": 2} if name == "vision_zip" else {}
        handle = attach_pruner(build_llava(), name, **options)
        assert name in repr(handle)
        handle.detach()
