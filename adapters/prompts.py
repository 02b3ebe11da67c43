"""One image and one question, in the form that a processor and its chat template want."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def prompt_text(processor: Any, question: str) -> str:
    """The prompt for one image and a question: by the processor's chat template, or the bare placeholder in front.

    Raises:
        ValueError: a processor without a chat template that does not name its image placeholder.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text
    placeholder = getattr(processor, "image_token", None)
    if not isinstance(placeholder, str):
        raise ValueError(
            f"{type(processor).__name__} has neither a chat template nor an image_token: no prompt can be made"
        )
    return f"{placeholder} {question}"


def prompt_inputs(processor: Any, image: Any, question: str, model: nn.Module) -> dict[str, Any]:
    """What ``processor`` makes of an image and a question, on the model's device and in its dtype.

    Args:
        processor: the model's.
        image: a PIL image.
        question: about it.
        model: that will run on it.
    """
    batch = processor(images=[image], text=[prompt_text(processor, question)], return_tensors="pt")
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    inputs = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            value = value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)
        inputs[name] = value
    return inputs


def decoded(processor: Any, ids: torch.Tensor) -> str:
    """The text of one sequence of tokens, special ones left out."""
    text: str = getattr(processor, "tokenizer", processor).decode(ids, skip_special_tokens=True)
    return text.strip()
