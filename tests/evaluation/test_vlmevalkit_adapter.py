"""The example for VLMEvalKit, on a stand-in for its base class: what lies on our side of the interface."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.evaluation.models import small_model
from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.lmms_eval import LmmsEvalModel


def test_the_example_answers_as_the_plugin_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = small_model(compressed=False, remember=False)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model, processor = small_model()
    attachment = find_attachment(model)
    assert attachment is not None
    VisionRememberHandle(attachment).save_pretrained(tmp_path / "adapter")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")

    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vlmeval.vlm.base"].BaseModel = object  # type: ignore[attr-defined]
    example = importlib.import_module("examples.vlmevalkit_adapter")
    ours = example.VisionRememberVLM(
        str(tmp_path / "base"), str(tmp_path / "adapter"), max_new_tokens=5, device="cpu", dtype="float32"
    )
    message = [{"type": "image", "value": str(tmp_path / "red.png")}, {"type": "text", "value": "what color?"}]
    assert find_attachment(ours.model) is not None

    lm = LmmsEvalModel(model, processor=processor)
    content = [
        {"type": "image", "image": Image.open(tmp_path / "red.png")},
        {"type": "text", "text": message[1]["value"]},
    ]
    inputs = lm._inputs([[{"role": "user", "content": content}]])
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert ours.generate_inner(message) == processor.tokenizer.decode(ids, skip_special_tokens=True)
    with pytest.raises(ValueError, match=r"parts of type \['video'\]: expected images and text"):
        ours.generate_inner([{"type": "video", "value": str(tmp_path / "film.mp4")}, *message])
