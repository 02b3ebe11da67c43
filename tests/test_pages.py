"""Every Python example of README and docs runs as it stands, on a small LLaVA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import vision_remember.adapters
from tests.hosts import DECODER_CONFIGS, build_llava, decoder_sizes, image_side
from tests.processors import llava_processor

ROOT = Path(__file__).resolve().parents[1]
# Pages that tell one story run in one namespace, block after block; the others start anew with each block.
ONE_STORY = {"docs/quick_start.md"}
RUN_BY_OTHERS = {
    "docs/training.md": "test_training_page.py",
    "docs/analysis.md": "test_analysis_page.py",
    "docs/extending.md": "test_extending_page.py",
    "docs/evaluation.md": "evaluation/test_plugin.py",
}


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


PAGES = [
    page
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if examples(page := path.relative_to(ROOT).as_posix()) and page not in RUN_BY_OTHERS
]


def host(*_: Any, dtype: torch.dtype = torch.float32, **__: Any) -> Any:
    """A LLaVA deep enough for blocks before layers 1 and 4, whatever checkpoint was asked for."""
    return build_llava("deep").to(dtype)


def processor(*_: Any, **__: Any) -> Any:
    made = llava_processor("clip", image_side(host()), 4)
    made.tokenizer.eos_token = "w2"
    return made


def what_pages_take_for_granted() -> dict[str, Any]:
    from vision_remember import attach_vision_remember, compress_projector, load_vision_remember

    model, image = host(), torch.full((3, 32, 32), 90, dtype=torch.uint8)
    batch = processor()(text=["<image> w20 w30"] * 2, images=[image, image // 2], return_tensors="pt")
    return {
        "torch": torch,
        "model": model,
        "processor": processor(),
        "prompt": "<image> w20",
        "image": image,
        "inputs": batch,
        "attach_vision_remember": attach_vision_remember,
        "compress_projector": compress_projector,
        "load_vision_remember": load_vision_remember,
    }


class Batches:
    """What a training loop is given, made when it is asked for: the processor may have been changed before."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.served = 0

    def __iter__(self) -> Any:
        for brightness in (40, 200):
            image = torch.full((3, 32, 32), brightness, dtype=torch.uint8)
            made = self.names["processor"](text=["<image> w20 w30"], images=[image], return_tensors="pt")
            made["pixel_values"] = made["pixel_values"].to(self.names["model"].dtype)
            self.served += 1
            yield {**made, "labels": made["input_ids"].clone()}


@pytest.fixture(autouse=True)
def _small_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DECODER_CONFIGS, "deep", lambda: hf.Qwen2Config(**{**decoder_sizes(), "num_hidden_layers": 6}))
    monkeypatch.setattr(hf.AutoModelForImageTextToText, "from_pretrained", host)
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", processor)


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page(page: str) -> None:
    names: dict[str, Any] = {}
    for number, code in enumerate(examples(page)):
        if number == 0 or page not in ONE_STORY:
            names = what_pages_take_for_granted()
            names["batches"] = Batches(names)
        exec(compile(code, f"{page}, example {number + 1}", "exec"), names)
    if page == "docs/quick_start.md":
        assert names["batches"].served == 2
        assert names["answer"].shape[0] == 1


def test_pages_run_by_others_are_run_there() -> None:
    for page, test in RUN_BY_OTHERS.items():
        assert examples(page)
        assert Path(page).name in (ROOT / "tests" / test).read_text()


def test_the_api_page_has_every_public_name() -> None:
    """As an entry, or in the sentence on tables. That each entry exists, the build of the site sees."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\.\. auto\w+:: [\w.]*?(\w+)(?:\(\))?$", page, re.MULTILINE))
    listed |= set(re.findall(r"`([A-Z]+)`", page.partition("## Tables")[2]))
    for module in (vision_remember, vision_remember.adapters):
        assert set(module.__all__) - listed == set()
