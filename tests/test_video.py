"""Video: each frame is a tile, and its tokens re-read its own cells. LLaVA's are in test_tiled_hosts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hosts import randomise
from tests.zoo import build_host
from vision_remember import attach_vision_remember
from vision_remember.adapters.resolve import resolve
from vision_remember.adapters.transport import rows_of

FRAMES = 3
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def build(model_type: str) -> tuple[Any, dict[str, Any]]:
    """A host and the arguments of its ``get_video_features``."""
    model = build_host(model_type)
    generator = torch.Generator().manual_seed(0)
    vision = model.config.vision_config
    grid = torch.tensor([[FRAMES, 4, 6]])
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grid.prod()), width, generator=generator)
    return model, {"pixel_values_videos": pixels, "video_grid_thw": grid}


def prompt(model: Any, video: dict[str, Any]) -> dict[str, Any]:
    """A prompt whose video stands where its host expects it: Qwen3-VL's frames each by themselves."""
    parts = resolve(model)
    token = parts.video_token_id
    with torch.no_grad():
        made = parts.base.get_video_features(**video).pooler_output  # type: ignore[operator]
    count = sum(len(part) for part in made)
    frames = FRAMES if model.config.model_type == "qwen3_vl" else 1
    start = getattr(model.config, "vision_start_token_id", 5)
    row = [3, 4]
    for _ in range(frames):
        row += [start] + [token] * (count // frames) + [6]
    ids = torch.tensor([[*row, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **video}
    return {**inputs, "mm_token_type_ids": (ids == token).long() * 2}


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("model_type", QWEN)
def test_frames_are_remembered_in_their_order(model_type: str) -> None:
    model, video = build(model_type)
    inputs = prompt(model, video)
    token = resolve(model).video_token_id
    logits(model, inputs)
    expected = logits(model, inputs)
    handle = attach_vision_remember(model, [1, 2])
    assert torch.equal(logits(model, inputs), expected)
    randomise(handle)
    changed = logits(model, inputs)
    assert not torch.allclose(changed, expected, atol=1e-3)
    other = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].clone()}
    last = len(other["pixel_values_videos"]) // FRAMES
    other["pixel_values_videos"][-last:] *= -1
    moved = (logits(model, other) - changed).abs().amax((0, 2)) > 1e-5
    places = (inputs["input_ids"][0] == token).nonzero().flatten()
    first = int(places[len(places) // FRAMES * (FRAMES - 1)])
    assert not moved[:first].any()
    assert moved[first:].all()
    made = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[token], eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    torch.testing.assert_close(made.logits[0][0], changed[0, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", QWEN)
def test_each_frame_has_the_cells_that_it_has_as_an_image(model_type: str) -> None:
    model, video = build(model_type)
    attach_vision_remember(model, [1])
    with torch.no_grad():
        of_video = rows_of(model.base_model.get_video_features(**video))
        frame = len(video["pixel_values_videos"]) // FRAMES
        of_image = rows_of(
            model.base_model.get_image_features(
                video["pixel_values_videos"][frame : 2 * frame], image_grid_thw=torch.tensor([[1, 4, 6]])
            )
        )
    assert of_video is not None
    assert of_image is not None
    (memory,), (single,) = of_video[0].memory, of_image[0].memory
    assert (memory.feature_grid, memory.token_grid) == ((4, 6), (2, 3))
    assert len(memory.levels[0]) == FRAMES
    for level, own in zip(memory.levels, single.levels, strict=True):
        torch.testing.assert_close(level[1], own[0])


def test_video_by_an_encoder_of_its_own_is_an_error() -> None:
    model = build_host("video_llava")
    attach_vision_remember(model, [1])
    side = model.config.vision_config.image_size
    with pytest.raises(ValueError, match="VideoLlavaModel encodes video by another module than the vision encoder"):
        model.model.get_video_features(torch.randn(1, 8, 3, side, side))
