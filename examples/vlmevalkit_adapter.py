"""A model with Vision Remember for VLMEvalKit, which has no plug-ins: register it, then run its own ``run.py`` logic.

    from functools import partial
    from vlmeval.config import supported_VLM
    from examples.vlmevalkit_adapter import VisionRememberVLM

    supported_VLM["llava-vr"] = partial(VisionRememberVLM, pretrained="llava-hf/llava-1.5-7b-hf", adapter="adapter/")

Written after VLMEvalKit's documentation and tried with a stand-in for its base class. It was never run inside
VLMEvalKit, which is not on PyPI. Its metrics differ from those of lmms-eval in details: do not mix their scores.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor
from vlmeval.vlm.base import BaseModel

from vision_remember.adapters import load_vision_remember
from vision_remember.adapters.base_model import load_base_model


class VisionRememberVLM(BaseModel):  # type: ignore[misc] # VLMEvalKit has no types
    """Answers messages of pictures and text with greedy decoding."""

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(self, pretrained: str, adapter: str | None = None, max_new_tokens: int = 1024, **loading: Any) -> None:
        super().__init__()
        self.model: Any = load_base_model(pretrained, adapter_follows=adapter is not None, **loading)
        self.processor = AutoProcessor.from_pretrained(pretrained)
        if adapter is not None:
            load_vision_remember(self.model, adapter, self.processor)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """One answer; ``message`` is ``[{"type": "image" | "text", "value": path | text}, ...]``."""
        others = {part["type"] for part in message} - {"image", "text"}
        if others:
            raise ValueError(f"parts of type {sorted(others)}: expected images and text")
        parts = [
            {"type": "image", "image": Image.open(part["value"]).convert("RGB")}
            if part["type"] == "image"
            else {"type": "text", "text": part["value"]}
            for part in message
        ]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answer: str = self.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer
