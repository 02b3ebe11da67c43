"""Vision transformers of timm and open_clip, described by their modules: levels, grids and saliency."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from vision_remember import MultiLevelTap

HEADS, DEPTH, WIDTH = 4, 4, 32
_SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0}


def _timm(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: timm.create_model(name, pretrained=False, **{**_SMALL, **options})


def _open_clip(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        vision = {"image_size": 32, "layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": 4}
        text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
        return open_clip.CLIP(16, {**vision, **options}, text).visual

    return make


# Prefix tokens, whether one is a CLS token, and the encoder.
ENCODERS: dict[str, tuple[int, bool, Callable[[], Any]]] = {
    "vit": (1, True, _timm("vit_tiny_patch16_224")),
    "vit, clip": (1, True, _timm("vit_base_patch16_clip_224")),
    "vit, siglip": (0, False, _timm("vit_base_patch16_siglip_224")),
    "vit, registers": (5, True, _timm("vit_small_patch14_reg4_dinov2")),
    "deit 3": (1, True, _timm("deit3_small_patch16_224")),
    "eva 02": (1, True, _timm("eva02_tiny_patch14_224", mlp_ratio=2)),
    "open_clip": (1, True, _open_clip()),
}


def build(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    encoder = make().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return encoder


def query_and_key(block: Any, state: Tensor) -> tuple[Tensor, Tensor]:
    """(B, positions, heads, d) each, by the block's own modules."""
    normed = block.ln_1(state) if hasattr(block, "ln_1") else block.norm1(state)
    attention = block.attn
    if isinstance(attention, nn.MultiheadAttention):
        fused = nn.functional.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
    elif attention.qkv is not None:
        fused = nn.functional.linear(normed, attention.qkv.weight, attention.qkv.bias)
    else:
        fused = torch.cat([attention.q_proj(normed), attention.k_proj(normed), normed], -1)
    query, key = fused[..., : 2 * WIDTH].chunk(2, -1)
    return query.unflatten(-1, (HEADS, -1)), key.unflatten(-1, (HEADS, -1))


@pytest.mark.parametrize("name", ENCODERS)
def test_levels_grid_and_saliency(name: str) -> None:
    prefix, has_cls, make = ENCODERS[name]
    encoder = build(make)
    blocks = encoder.transformer.resblocks if name == "open_clip" else encoder.blocks
    states: list[Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: states.append(args[0])) for block in blocks]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tap = MultiLevelTap(encoder, (0, 1, 3), saliency_level=2)
    with torch.no_grad(), tap.capture() as captured:
        encoder(pixels)
    for handle in handles:
        handle.remove()
    assert captured.grid == (8, 8)
    for level, features in zip((0, 1, 3), captured.levels, strict=True):
        assert torch.equal(features, states[level][:, prefix:])
    assert tap.saliency == ("cls" if has_cls else "received")
    with torch.no_grad():
        query, key = query_and_key(blocks[1], states[1])
    query = query[:, :1] if has_cls else query[:, prefix:]
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key[:, prefix:]).mean((1, 2)) / math.sqrt(WIDTH // HEADS)
    torch.testing.assert_close(captured.saliency, logits.sigmoid())


def test_forward_features_is_captured_too_and_the_last_run_counts() -> None:
    encoder = build(ENCODERS["vit"][2])
    first, second = torch.randn(2, 1, 3, 32, 32).unbind()
    tap = MultiLevelTap(encoder, (2,))
    with torch.no_grad(), tap.capture() as captured:
        encoder.forward_features(first)
        encoder.forward_features(second)
    with torch.no_grad(), tap.capture() as alone:
        encoder(second)
    assert torch.equal(captured.joined(), alone.joined())
    assert torch.equal(captured.saliency, alone.saliency)
