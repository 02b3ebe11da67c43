"""Swapping the projector of hosts that cut images into tiles, with their real processors, over images of odd sizes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.fingerprint import Fingerprint
from tests.hosts import IMAGE_TOKEN, randomise
from tests.processors import tokenizer
from tests.test_tiled_hosts import SIDE, VIDEO_TOKEN, build, video_prompt
from vision_remember import attach_vision_remember, compress_projector, detach_vision_remember, load_vision_remember

SIZES = [(40, 61), (30, 30), (90, 33), (17, 100), (64, 64)]
every_host = pytest.mark.parametrize(
    ("host", "encoder"), [("llava_next", "clip"), ("llava_next_video", "clip"), ("llava_onevision", "siglip")]
)


def processor_of(host: str, model: Any) -> Any:
    side = model.config.vision_config.image_size
    patch = model.config.vision_config.patch_size
    sizes = {"size": {"height": side, "width": side}, "image_grid_pinpoints": model.config.image_grid_pinpoints}
    if host == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(**sizes)
        return hf.LlavaOnevisionProcessor(
            images, tokenizer(), hf.LlavaOnevisionVideoProcessor(**sizes), (side // patch) ** 2, "full"
        )
    sizes |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images = LlavaNextImageProcessorPil(**sizes)
    if host == "llava_next_video":
        videos = hf.LlavaNextVideoVideoProcessor(size={"shortest_edge": side})
        return hf.LlavaNextVideoProcessor(
            videos, images, tokenizer(), None, patch, "default", num_additional_image_tokens=1
        )
    return hf.LlavaNextProcessor(images, tokenizer(), patch, "default", num_additional_image_tokens=1)


def ask(processor: Any, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    return dict(processor(text="w3 <image> w4 w5", images=[image], return_tensors="pt"))


def tokens(inputs: dict[str, torch.Tensor]) -> int:
    return int((inputs["input_ids"] == IMAGE_TOKEN).sum())


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@every_host
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_placeholders_and_features_agree_on_every_size(host: str, encoder: str, size: tuple[int, int]) -> None:
    model = build(host, encoder)
    processor = processor_of(host, model)
    full = ask(processor, size)
    expected = logits(model, full)
    before, settings = Fingerprint(model), copy.deepcopy(vars(processor))
    side = SIDE[encoder] // 4
    out_grid = (side // 2, side // 2)
    handle = compress_projector(model, processor, "adaptive_avg_pool", out_grid=out_grid)
    pooled = ask(processor, size)
    assert tokens(pooled) < tokens(full) / 2
    inside = logits(model, pooled)  # raises if placeholders and features disagree
    attached = attach_vision_remember(model, [0, 2])
    assert torch.equal(logits(model, pooled), inside)
    randomise(attached)
    assert not torch.allclose(logits(model, pooled), inside, atol=1e-2)
    made = model.generate(**pooled, max_new_tokens=2, do_sample=False, suppress_tokens=[IMAGE_TOKEN, VIDEO_TOKEN])
    assert made.shape[1] == pooled["input_ids"].shape[1] + 2
    detach_vision_remember(model)
    handle.restore()
    before.check(model)
    assert {name: value for name, value in vars(processor).items() if isinstance(value, int)} == {
        name: value for name, value in settings.items() if isinstance(value, int)
    }
    assert torch.equal(logits(model, ask(processor, size)), expected)


@every_host
def test_every_pooled_token_reads_the_cells_it_was_pooled_from(host: str, encoder: str) -> None:
    """Features of a tile's cells are their numbers, pooled by the projector: a block that pools them agrees."""
    model = build(host, encoder)
    processor = processor_of(host, model)
    compress_projector(model, processor, "adaptive_avg_pool", out_grid=(2, 2))
    attached = attach_vision_remember(model, [0])
    memories: list[Any] = []
    attached.module["0"].forward = lambda given, features, **grids: memories.append((given, grids)) or given
    inputs = ask(processor, (40, 61))
    logits(model, inputs)
    ((given, grids),) = memories
    side = SIDE[encoder] // 4
    assert (grids["token_grid"], grids["feature_grid"]) == ((2, 2), (side, side))
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    made: list[torch.Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda _, args, output: made.append(output))
    with torch.no_grad():
        model.model.get_image_features(**images)
    hook.remove()
    held = given.abs().sum(-1) > 0
    torch.testing.assert_close(given[held], made[0][held])


def test_copies_lay_out_their_tokens_too() -> None:
    model = build("llava_next", "clip")
    processor = processor_of("llava_next", model)
    handle = compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    inputs = ask(processor, (40, 61))
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    handle.restore()
    assert torch.equal(logits(twin, inputs), expected)
    assert tokens(ask(processor, (40, 61))) > tokens(inputs)


@pytest.mark.parametrize("host", ["llava_next_video", "llava_onevision"])
def test_video_is_pooled_once_more(host: str) -> None:
    encoder = "clip" if host == "llava_next_video" else "siglip"
    model = build(host, encoder)
    before = video_prompt(model, 2, [(40, 61)])
    compress_projector(model, None, "adaptive_avg_pool", ratio=4 if encoder == "clip" else 49)
    inputs = video_prompt(model, 2, [(40, 61)])
    assert (inputs["input_ids"] == VIDEO_TOKEN).sum() < (before["input_ids"] == VIDEO_TOKEN).sum() / 2
    expected = logits(model, inputs)
    randomise(attach_vision_remember(model, [0, 2]))
    assert not torch.allclose(logits(model, inputs), expected, atol=1e-2)


def test_an_adapter_with_its_projector_loads(tmp_path: Path) -> None:
    model, fresh = build("llava_next", "clip"), build("llava_next", "clip")
    processor, other = (processor_of("llava_next", each) for each in (model, fresh))
    compress_projector(model, processor, "ldpv2", ratio=4)
    handle = attach_vision_remember(model, [0, 2])
    randomise(handle)
    handle.save_pretrained(tmp_path)
    load_vision_remember(fresh, tmp_path, other)
    inputs = ask(other, (40, 61))
    assert tokens(inputs) == tokens(ask(processor, (40, 61)))
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adaptive_avg_pool", {"out_grid": (2, 4)}, "out_grid=2x4.*lays out square tiles of 32 pixels"),
        ("c_abstractor", {"ratio": 4, "end_tokens": 2}, "end_tokens=2.*stitches tiles"),
    ],
)
def test_what_tiles_cannot_be_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    model = build("llava_next", "clip")
    processor = processor_of("llava_next", model)
    logits(model, ask(processor, (40, 61)))
    before = Fingerprint(model)
    with pytest.raises(ValueError, match=message):
        compress_projector(model, processor, name, **options)
    before.check(model)


def test_a_processor_of_another_model_is_refused() -> None:
    model = build("llava_next", "clip")
    processor = processor_of("llava_next", model)
    processor.patch_size = 16  # with 8 it would be the model's own, saved when it was compressed
    with pytest.raises(ValueError, match="emits 4 image tokens per tile, but the model's projector makes 64"):
        compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
