"""Hosts of transformers whose vision tower is one of timm's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.fingerprint import Fingerprint
from tests.hosts import IMAGE_TOKEN, randomise
from vision_remember import attach_vision_remember, load_vision_remember
from vision_remember.grid import Grid

_TEXT = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def _fast_vlm() -> Any:
    sizes = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128), "mlp_ratios": (2, 2, 2, 2)}
    vision = hf.TimmWrapperConfig(architecture="fastvit_t8", model_args=sizes, do_pooling=False, hidden_size=256)
    text = hf.Qwen2Config(**_TEXT)
    config = hf.FastVlmConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    return hf.FastVlmForConditionalGeneration(config)


def _perception_lm() -> Any:
    sizes = {
        "embed_dim": 32,
        "img_size": [28, 28],
        "patch_size": 7,
        "depth": 4,
        "num_heads": 4,
        "global_pool": "",
        "ref_feat_shape": [4, 4],
        "use_post_transformer_norm": False,
        "init_values": 0.1,
        "mlp_ratio": 2,
    }
    name = "vit_pe_core_large_patch14_336"
    vision = hf.TimmWrapperConfig(architecture=name, model_args=sizes, do_pooling=False, hidden_size=64)
    config = hf.PerceptionLMConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE_TOKEN,
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
    )
    return hf.PerceptionLMForConditionalGeneration(config)


# The model, its pixels, cells and tokens of a tile, and where its saliency comes from.
HOSTS: dict[str, tuple[Callable[[], Any], tuple[int, ...], Grid, Grid, str | None]] = {
    "fast_vlm": (_fast_vlm, (2, 3, 256, 256), (8, 8), (8, 8), None),
    "perception_lm": (_perception_lm, (1, 2, 3, 28, 28), (4, 4), (2, 2), "cls"),
}
every_host = pytest.mark.parametrize("host", HOSTS)


def build(host: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A host, and a prompt with two images."""
    make, shape, _, (h, w), _ = HOSTS[host]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * (h * w), 6, *[IMAGE_TOKEN] * (h * w), 7, 8]])
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@every_host
def test_attach_generate_save_load_and_detach(host: str, tmp_path: Path) -> None:
    model, inputs = build(host)
    _, _, cells, tokens, saliency = HOSTS[host]
    expected = logits(model, inputs)
    before = Fingerprint(model)
    handle = attach_vision_remember(model, [1, 2])
    geometry = handle.spec.geometry
    assert geometry is not None
    assert (geometry.feature_grid, geometry.token_grid) == (cells, tokens)
    assert handle.config.saliency == saliency
    assert torch.equal(logits(model, inputs), expected)
    randomise(handle)
    changed = logits(model, inputs)
    assert not torch.allclose(changed, expected, atol=1e-3)
    generated = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(generated.logits[0][0], changed[0, -1], rtol=1e-4, atol=1e-4)
    handle.save_pretrained(tmp_path)
    fresh, _ = build(host)
    load_vision_remember(fresh, tmp_path)
    assert torch.equal(logits(fresh, inputs), changed)
    handle.detach()
    before.check(model)


@every_host
def test_each_token_reads_the_cells_of_its_own_image(host: str) -> None:
    """The second image changes: the first image's tokens stay as they are after the block."""
    model, inputs = build(host)
    randomise(attach_vision_remember(model, [0]))
    seen: list[torch.Tensor] = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, inputs)
    other = inputs["pixel_values"].clone()
    other.flatten(0, -4)[-1] += 1
    logits(model, {**inputs, "pixel_values": other})
    moved = (seen[0] - seen[1]).abs().amax((0, 2)) > 1e-6
    count = int((inputs["input_ids"] == IMAGE_TOKEN).sum()) // 2
    assert moved.tolist() == [False] * (count + 2) + [True] * count + [False] * 2
