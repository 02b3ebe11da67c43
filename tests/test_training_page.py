"""The examples of docs/training.md run as they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.hosts import IMAGE_TOKEN, build_llava, image_side
from tests.processors import llava_processor
from tests.test_trainer import CHAT, conversations

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text()
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
EXAMPLES = [
    pytest.param(code, id=f"{section.splitlines()[0]} {number}")
    for section in SECTIONS
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE), 1)
]

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(name="names")
def what_the_page_takes_for_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model = build_llava()
    side = image_side(model)
    processor = llava_processor("clip", side, 4)
    processor.chat_template, processor.tokenizer.eos_token = CHAT, "w2"
    pages = [torch.full((3, side, side), 20 * index, dtype=torch.uint8) for index in range(8)]

    def collate(rows: list[Any]) -> Any:
        texts, images = [row["text"] for row in rows], [row["image"] for row in rows]
        inputs = processor(text=texts, images=images, return_tensors="pt")
        labels = inputs["input_ids"]
        return {**inputs, "labels": labels.masked_fill(labels == IMAGE_TOKEN, -100)}

    yield {
        "model": model,
        "processor": processor,
        "dataset": [{"text": f"<image> w20 w{30 + index}", "image": page} for index, page in enumerate(pages)],
        "collate": collate,
        "conversations": conversations(4),
    }
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) == 7


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_runs_and_leaves_an_adapter(code: str, names: dict[str, Any], tmp_path: Path) -> None:
    if "fully_shard" in code:
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    exec(compile(code, "docs/training.md", "exec"), names)
    assert list(tmp_path.rglob("adapter_model.safetensors"))
