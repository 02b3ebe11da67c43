"""LLaVA-NeXT: tiles, padding and newlines. Which token stands for which cells is proven on images of odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tests.fingerprint import Fingerprint
from tests.hosts import DECODER_CONFIGS, ENCODER_CONFIGS, IMAGE_TOKEN, randomise, skip_if_the_host_fails
from vision_remember import attach_vision_remember, compress_projector, detach_vision_remember

SIDE = {"clip": 32, "siglip": 28}


def build(encoder: str = "clip", decoder: str = "qwen2") -> Any:
    torch.manual_seed(0)
    side = SIDE[encoder]
    model = hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            vision_config=ENCODER_CONFIGS[encoder](),
            text_config=DECODER_CONFIGS[decoder](),
            image_token_id=IMAGE_TOKEN,
            vision_feature_select_strategy="default" if encoder == "clip" else "full",
            image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side]],
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def pixels_of(model: Any, sizes: list[tuple[int, int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """What the image processor makes of images of these (height, width): tiles, padded to the most of the batch."""
    side, pinpoints = model.config.vision_config.image_size, model.config.image_grid_pinpoints
    tiles = [image_size_to_num_patches(size, pinpoints, side) for size in sizes]
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(len(sizes), max(tiles), 3, side, side, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def prompt(model: Any, groups: list[list[tuple[int, int]]]) -> dict[str, torch.Tensor]:
    """A left padded batch of prompts with images of these sizes each."""
    sizes = [size for group in groups for size in group]
    images = pixels_of(model, sizes)
    with torch.no_grad():
        lengths = iter([len(image) for image in model.model.get_image_features(**images).pooler_output])
    rows = [[5] + [t for _ in group for t in [IMAGE_TOKEN] * next(lengths) + [6, 7]] for group in groups]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **images}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


GROUPS = [[(40, 61), (30, 30)], [(90, 33)]]


@pytest.mark.parametrize("encoder", SIDE)
@pytest.mark.parametrize("decoder", DECODER_CONFIGS)
def test_attach_is_an_identity_and_detach_leaves_no_trace(encoder: str, decoder: str) -> None:
    model = build(encoder, decoder)
    inputs = prompt(model, GROUPS)
    expected = logits(model, inputs)
    before = Fingerprint(model)
    handle = attach_vision_remember(model, [1, 3])
    assert torch.equal(logits(model, inputs), expected)
    randomise(handle)
    assert not torch.allclose(logits(model, inputs), expected, atol=0.1)
    detach_vision_remember(model)
    before.check(model)


_SIZES = st.tuples(st.integers(8, 120), st.integers(8, 120))
_MODEL = build()
_HANDLE = attach_vision_remember(_MODEL, [0])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(_SIZES, min_size=1, max_size=3))
def test_every_token_finds_the_cells_that_made_it(sizes: list[tuple[int, int]]) -> None:
    """A projector whose tokens are the positions of their cells, and features that are the same positions."""
    seen: dict[str, Any] = {}
    projector = _MODEL.model.multi_modal_projector

    def number(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        tiles, cells = output.shape[:2]
        numbers = torch.arange(tiles * cells, dtype=output.dtype).view(tiles, cells, 1)
        return numbers.expand_as(output) + 1

    def spy(tokens: torch.Tensor, features: torch.Tensor, **_: Any) -> torch.Tensor:
        seen["tokens"] = tokens
        return tokens + 0.5

    handle = projector.register_forward_hook(number, prepend=True)
    block = _HANDLE.module["0"]
    own_forward, block.forward = block.forward, spy
    try:
        inputs = prompt(_MODEL, [sizes])
        before: list[torch.Tensor] = []
        after: list[torch.Tensor] = []
        layer = _MODEL.model.language_model.layers[0]
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: before.append(args[0]), prepend=True),
            layer.register_forward_pre_hook(lambda _, args: after.append(args[0])),
        ]
        logits(_MODEL, inputs)
    finally:
        block.forward = own_forward
        for hook in (handle, *hooks):
            hook.remove()
    tokens = seen["tokens"][..., 0].flatten()
    slots = torch.arange(len(tokens), dtype=tokens.dtype) + 1
    held = tokens != 0
    assert torch.equal(tokens[held], slots[held])  # each token came to its own place; the others were unpadded away
    changed = (after[0] != before[0])[..., 0]
    values = before[0][..., 0]
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    newline = _MODEL.model.image_newline.detach()[0]
    assert torch.equal(changed, is_image & (values != newline))
    assert int(changed.sum()) == int(held.sum())


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 9}, {"num_beams": 3}, {"cache_implementation": "static"}],
)
def test_generate_equals_the_samples_one_by_one(options: dict[str, Any]) -> None:
    if "prefill_chunk_size" in options:
        skip_if_the_host_fails("chunked prefill")
    model = build()
    randomise(attach_vision_remember(model, [1, 3]))
    common = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN], **options}
    together = model.generate(**prompt(model, GROUPS), **common)[:, -5:]
    inputs = prompt(model, GROUPS)
    sizes, pixels = inputs["image_sizes"], inputs["pixel_values"]
    for row, images in ((0, slice(0, 2)), (1, slice(2, 3))):
        kept = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        alone = {"input_ids": kept, "attention_mask": torch.ones_like(kept)}
        single = {**common, "prefill_chunk_size": None}
        expected = model.generate(**alone, pixel_values=pixels[images], image_sizes=sizes[images], **single)
        assert torch.equal(together[row], expected[0, -5:])


def test_compressing_it_is_refused() -> None:
    model = build()
    before = Fingerprint(model)
    with pytest.raises(ValueError, match="cannot be compressed yet"):
        compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    before.check(model)


def test_gradients_reach_every_parameter_of_the_blocks() -> None:
    model = build().train()
    handle = attach_vision_remember(model, [1, 3], window=2)  # uncompressed, so more than one cell to choose from
    randomise(handle)
    inputs = prompt(model, GROUPS)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.module.parameters())
