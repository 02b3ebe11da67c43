"""Small Hugging Face encoders with random weights, and what the tests of the tap do with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from vision_remember import MultiLevelTap

DEPTH, HEADS, WIDTH, PATCH = 4, 2, 24, 4
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": 28,
    "patch_size": PATCH,
}
GRID, PATCHES = (7, 7), 49
BUILDERS: dict[str, Callable[[], Any]] = {
    "clip": lambda: hf.CLIPVisionConfig(**SIZES),
    "siglip": lambda: hf.SiglipVisionConfig(**SIZES),
}
PREFIX = {"clip": 1, "siglip": 0}

every_encoder = pytest.mark.parametrize("name", BUILDERS)


def build(name: str = "clip", *, attention: str = "sdpa") -> Any:
    """Random weights, large enough that attention prefers something."""
    torch.manual_seed(0)
    encoder = hf.AutoModel.from_config(BUILDERS[name](), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return encoder


def images(seed: int = 1, *, batch: int = 2, size: tuple[int, int] = (28, 28)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def captured(encoder: Any, pixels: Tensor, *, run: dict[str, Any] | None = None, **options: Any) -> Any:
    with MultiLevelTap(encoder, **{"levels": (2, 4), **options}).capture() as result:
        encoder(pixels, **(run or {}))
    return result


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def logits_of(encoder: Any, level: int, pixels: Tensor) -> Tensor:
    """(B, heads, positions, positions), q.k / sqrt(d) in the block that leads to a level, from its own q and k."""
    attention = encoder.encoder.layers[level - 1].self_attn
    seen: dict[str, Tensor] = {}
    handles = [
        getattr(attention, f"{which}_proj").register_forward_hook(
            lambda _module, _args, output, which=which: seen.__setitem__(which, output)
        )
        for which in "qk"
    ]
    with torch.no_grad():
        encoder(pixels)
    for handle in handles:
        handle.remove()
    query, key = (seen[which].unflatten(-1, (HEADS, -1)).transpose(1, 2) for which in "qk")
    return query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
