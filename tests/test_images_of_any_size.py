"""Images with grids of their own in one call: LLaVA with Pixtral's tower, each size by itself and all together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from tests.fingerprint import Fingerprint
from tests.hosts import DECODER_CONFIGS, IMAGE_TOKEN, randomise, skip_if_the_host_fails
from vision_remember import attach_vision_remember

SIZES = [(16, 32), (24, 16), (16, 32), (8, 8)]


def build(interaction: str = "sela") -> tuple[Any, Any]:
    torch.manual_seed(0)
    vision = hf.PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        image_size=64, patch_size=4,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=DECODER_CONFIGS["mistral"](),
        image_token_id=IMAGE_TOKEN,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = hf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        model(**prompt([0]))
    handle = attach_vision_remember(model, [1, 2], interaction=interaction)
    randomise(handle)
    return model, handle


def prompt(images: list[int]) -> dict[str, Tensor]:
    """One prompt with these images of ``SIZES``."""
    pixels = torch.randn(len(SIZES), 3, 24, 32, generator=torch.Generator().manual_seed(1))[images]
    sizes = torch.tensor(SIZES)[images]
    row = [5]
    for height, width in sizes.tolist():
        row += [IMAGE_TOKEN] * (height * width // 16) + [6]
    ids = torch.tensor([[*row, 7]])
    # The processor pads to the largest image of the call.
    pixels = pixels[:, :, : sizes[:, 0].max(), : sizes[:, 1].max()]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}


def updates(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(S, D), what the first block adds."""
    layer = model.model.language_model.layers[1]
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=True),
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return (seen[1] - seen[0])[0]


def test_it_is_an_identity_until_trained_and_leaves_nothing() -> None:
    model, handle = build()
    handle.detach()
    inputs = prompt([0, 1, 2, 3])
    before = Fingerprint(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        handle = attach_vision_remember(model, [1, 2])
        assert torch.equal(model(**inputs).logits, expected)
    assert "a token for 1x1 cells" in str(handle)
    handle.detach()
    before.check(model)


@pytest.mark.parametrize("interaction", ["sela", "deformable", "global"])
def test_images_together_read_what_each_reads_alone(interaction: str) -> None:
    """At the first block tokens have seen the images in front of them, so the same image comes first in both."""
    model, _ = build(interaction)
    for first, others in ((0, [1, 2, 3]), (1, [0, 3]), (3, [1])):
        together = updates(model, prompt([first, *others]))
        alone = updates(model, prompt([first]))
        count = SIZES[first][0] * SIZES[first][1] // 16
        assert alone[1 : 1 + count].any(-1).all()
        torch.testing.assert_close(together[1 : 1 + count], alone[1 : 1 + count], rtol=1e-4, atol=1e-5)


def test_the_block_is_called_once_for_all_sizes() -> None:
    model, handle = build()
    calls: list[int] = []
    handle.module["1"].register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    changed = updates(model, prompt([0, 1, 2, 3])).any(-1)
    assert calls == [3]  # three sizes
    assert torch.equal(changed, (prompt([0, 1, 2, 3])["input_ids"] == IMAGE_TOKEN)[0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}, {"use_cache": False}], ids=str)
def test_generation_equals_the_full_forward(options: dict[str, Any]) -> None:
    if "prefill_chunk_size" in options:
        skip_if_the_host_fails("chunked prefill")
    model, _ = build()
    inputs = prompt([0, 1, 3])
    common = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
    made = model.generate(**inputs, **common, **options)
    if "num_beams" in options:
        assert torch.equal(model.generate(**inputs, **common, **options, use_cache=False), made)
        return
    for step in range(4):
        ids = made[:, : inputs["input_ids"].shape[1] + step]
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -1]
        logits[IMAGE_TOKEN] = -torch.inf
        assert logits.argmax() == made[0, ids.shape[1]]
