"""Granite 4 Vision: tokens for several layers, packed as tiles, from projectors in a list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tests.fingerprint import Fingerprint
from tests.hosts import IMAGE_TOKEN, decoder_sizes, randomise
from tests.test_tiled_hosts import pixels_of
from vision_remember import attach_vision_remember
from vision_remember.adapters.transport import rows_of

SIDE, SIZES = 64, [(80, 122), (60, 60), (40, 180)]


def build() -> Any:
    torch.manual_seed(0)
    vision = hf.SiglipVisionConfig(
        hidden_size=64, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, image_size=SIDE, patch_size=4
    )
    config = hf.Granite4VisionConfig(
        vision_config=vision,
        text_config=hf.Granite4VisionTextConfig(**decoder_sizes()),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="full",
        downsample_rate="4/8",
        deepstack_layer_map=[[2, 0], [4, 1]],
        spatial_target_layers=[0, 1, 2, 3],
        image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE]],
        qformer_config={
            "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
            "encoder_hidden_size": 64, "cross_attention_frequency": 1, "vocab_size": 20, "max_position_embeddings": 32,
        },
    )  # fmt: skip
    model = hf.Granite4VisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def prompt(model: Any) -> dict[str, torch.Tensor]:
    images = pixels_of(model, SIZES)
    with torch.no_grad():
        _, tokens = model.model.get_image_features(**images).deepstack_features[0]
    ids = torch.tensor([[5] + [t for image in tokens for t in [IMAGE_TOKEN] * len(image) + [6, 7]]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_attach_generate_and_detach() -> None:
    model = build()
    inputs = prompt(model)
    expected = logits(model, inputs)
    before = Fingerprint(model)
    handle = attach_vision_remember(model, [1, 2])
    assert torch.equal(logits(model, inputs), expected)
    randomise(handle)
    changed = logits(model, inputs)
    assert not torch.allclose(changed, expected, atol=0.1)
    made = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE_TOKEN],
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    torch.testing.assert_close(made.logits[0][0], changed[0, -1], rtol=1e-4, atol=1e-4)
    handle.detach()
    before.check(model)


def test_every_token_has_the_place_that_the_hosts_own_packing_gives_it() -> None:
    model = build()
    attach_vision_remember(model, [1])
    images = pixels_of(model, SIZES)
    with torch.no_grad():
        output = model.model.get_image_features(**images)
    (memory,) = rows_of(output)[0].memory
    assert (memory.token_grid, memory.feature_grid) == ((8, 8), (16, 16))
    tiles = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, SIDE) for size in SIZES]
    numbers = torch.arange(sum(tiles) * 64.0).view(-1, 64, 1)
    newline = torch.full((1,), -1.0)
    packed = model.model.pack_image_features(
        torch.split(numbers, tiles), images["image_sizes"], vision_feature_select_strategy="full", image_newline=newline
    )
    packed = packed[0] if isinstance(packed, tuple) else packed
    assert memory.slots is not None
    assert torch.equal(memory.slots, torch.cat(list(packed)).flatten().long())


def test_every_parameter_of_the_blocks_learns() -> None:
    model = build().train()
    handle = attach_vision_remember(model, [1, 2])
    randomise(handle)
    inputs = prompt(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.module.parameters())


@pytest.mark.parametrize("rate", ["2/8"])
def test_another_rate_needs_its_grid(rate: str) -> None:
    model = build()
    model.model.downsample_rate = rate
    for projector in [*model.model.layerwise_projectors, *model.model.spatial_projectors]:
        projector.register_forward_hook(lambda _, args, output: output[:, :16])
    attach_vision_remember(model, [1])
    with pytest.raises(ValueError, match="made 16 vision tokens of a tile, but token_grid=8x8"):
        model.model.get_image_features(**pixels_of(model, SIZES))
