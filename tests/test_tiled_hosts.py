"""Hosts that cut images into tiles: stitching, padding, newlines, shrinking, and the frames of a video.

Which token stands for which cells is proven on images of odd sizes.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from tests.fingerprint import Fingerprint
from tests.hosts import DECODER_CONFIGS, ENCODER_CONFIGS, IMAGE_TOKEN, randomise, skip_if_the_host_fails
from vision_remember import attach_vision_remember, detach_vision_remember
from vision_remember.adapters.transport import rows_of
from vision_remember.grid import region

SIDE = {"clip": 32, "siglip": 28}
VIDEO_TOKEN = 91

HOSTS: dict[str, Any] = {
    "llava_next": (hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig),
    "llava_next_video": (hf.LlavaNextVideoForConditionalGeneration, hf.LlavaNextVideoConfig),
    "llava_onevision": (hf.LlavaOnevisionForConditionalGeneration, hf.LlavaOnevisionConfig),
}
WITH_VIDEO = ("llava_next_video", "llava_onevision")
every_host = pytest.mark.parametrize("host", HOSTS)


def build(host: str = "llava_next", encoder: str = "clip", decoder: str = "qwen2", **options: Any) -> Any:
    torch.manual_seed(0)
    side = SIDE[encoder]
    model_class, config_class = HOSTS[host]
    options |= {"video_token_id": VIDEO_TOKEN} if host in WITH_VIDEO else {}
    model = model_class(
        config_class(
            vision_config=ENCODER_CONFIGS[encoder](),
            text_config=DECODER_CONFIGS[decoder](),
            image_token_id=IMAGE_TOKEN,
            vision_feature_select_strategy="default" if encoder == "clip" else "full",
            image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side]],
            **options,
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


PAIRINGS = [("llava_next", encoder, decoder) for encoder in SIDE for decoder in DECODER_CONFIGS]


@pytest.mark.parametrize(
    ("host", "encoder", "decoder"),
    [*PAIRINGS, *((host, encoder, "qwen2") for host in WITH_VIDEO for encoder in SIDE)],
)
def test_attach_is_an_identity_and_detach_leaves_no_trace(host: str, encoder: str, decoder: str) -> None:
    model = build(host, encoder, decoder)
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
_MODELS = {host: build(host) for host in HOSTS}
_SHRINKING = build("llava_onevision", "siglip", vision_aspect_ratio="anyres_max_1")
attach_vision_remember(_SHRINKING, [0])
_HANDLES = {host: attach_vision_remember(model, [0]) for host, model in _MODELS.items()}


@every_host
@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes=st.lists(_SIZES, min_size=1, max_size=3))
def test_every_token_finds_the_cells_that_made_it(host: str, sizes: list[tuple[int, int]]) -> None:
    """A projector whose tokens are the positions of their cells, and features that are the same positions."""
    seen: dict[str, Any] = {}
    model = _MODELS[host]
    projector = model.model.multi_modal_projector

    def number(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        tiles, cells = output.shape[:2]
        numbers = torch.arange(tiles * cells, dtype=output.dtype).view(tiles, cells, 1)
        return numbers.expand_as(output) + 1

    def spy(tokens: torch.Tensor, features: torch.Tensor, **_: Any) -> torch.Tensor:
        seen["tokens"] = tokens
        return tokens + 0.5

    handle = projector.register_forward_hook(number, prepend=True)
    block = _HANDLES[host].module["0"]
    own_forward, block.forward = block.forward, spy
    try:
        inputs = prompt(model, [sizes])
        before: list[torch.Tensor] = []
        after: list[torch.Tensor] = []
        layer = model.model.language_model.layers[0]
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: before.append(args[0]), prepend=True),
            layer.register_forward_pre_hook(lambda _, args: after.append(args[0])),
        ]
        logits(model, inputs)
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
    newline = model.model.image_newline.detach()[0]
    assert torch.equal(changed, is_image & (values != newline))
    assert int(changed.sum()) == int(held.sum())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes=st.lists(st.tuples(st.integers(30, 120), st.integers(30, 120)), min_size=1, max_size=2))
def test_tokens_of_a_shrunk_image_stand_for_the_nearest_of_those_they_blend(sizes: list[tuple[int, int]]) -> None:
    """The host itself shrinks coordinates in place of features; they tell what each token blends."""
    model = _SHRINKING
    side = model.config.vision_config.image_size
    per_side = side // model.config.vision_config.patch_size
    inputs = pixels_of(model, sizes)
    tiles = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, side) for size in sizes]

    # Rows and columns over the stitched tiles of each image; far apart from image to image and from the base tile.
    coordinates = torch.zeros(sum(tiles), per_side, per_side, 2)
    grids = [get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, side) for size in sizes]
    first = 0
    for (_, columns), count, base in zip(grids, tiles, (1000 * n for n in range(1, 9)), strict=False):
        for tile in range(count):
            top, left = divmod(max(tile - 1, 0), columns)
            row = torch.arange(per_side)[:, None] + top * per_side + base
            column = torch.arange(per_side)[None] + left * per_side + (500 if tile == 0 else 0)
            coordinates[first + tile] = torch.stack(torch.broadcast_tensors(row, column), -1)
        first += count
    projector = model.model.multi_modal_projector

    def place(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        made = torch.zeros_like(output)
        made[..., :2] = coordinates.flatten(1, 2)
        return made

    handle = projector.register_forward_hook(place)
    try:
        with torch.no_grad():
            output = model.model.get_image_features(**inputs)
    finally:
        handle.remove()
    (memory,) = rows_of(output)[0].memory
    tokens = torch.cat(list(output.pooler_output))[:, :2]
    assert memory.slots is not None
    cells = memory.slots >= 0
    assert torch.equal(~cells, (tokens == model.model.image_newline[:2]).all(-1))
    distance = (coordinates.view(-1, 2)[memory.slots[cells]] - tokens[cells]).abs()
    assert distance.max() <= 0.5 + 1e-3
    assert len(memory.slots[cells].unique()) == int(cells.sum())


def video_prompt(model: Any, frames: int, sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """One prompt with images of these sizes and then a video."""
    inputs = prompt(model, [sizes]) if sizes else {"input_ids": torch.tensor([[5]])}
    side = model.config.vision_config.image_size
    video = torch.randn(1, frames, 3, side, side, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        count = len(model.model.get_video_features(pixel_values_videos=video).pooler_output[0])
    ids = torch.cat([inputs["input_ids"][0], torch.tensor([8] + [VIDEO_TOKEN] * count + [9, 10])])[None]
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": video}


@pytest.mark.parametrize("images", [[], [(40, 61), (90, 80)]], ids=["video", "images and video"])
@pytest.mark.parametrize("encoder", SIDE)
@pytest.mark.parametrize("host", WITH_VIDEO)
def test_video_tokens_re_read_their_frames(host: str, encoder: str, images: list[tuple[int, int]]) -> None:
    model = build(host, encoder)
    inputs = video_prompt(model, 3, images)
    expected = logits(model, inputs)
    handle = attach_vision_remember(model, [0, 2])
    assert torch.equal(logits(model, inputs), expected)
    randomise(handle)
    changed = logits(model, inputs)
    assert not torch.allclose(changed, expected, atol=0.1)
    # The frame that changes is the last: nothing before its tokens may move, its own tokens must.
    other = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].clone()}
    other["pixel_values_videos"][0, -1] += 1
    moved = (logits(model, other) - changed).abs().amax((0, 2)) > 1e-6
    video = (inputs["input_ids"][0] == VIDEO_TOKEN).nonzero().flatten()
    tokens = len(video) - (host == "llava_onevision")  # a newline follows the last frame
    first = int(video[0]) + tokens // 3 * 2
    assert not moved[:first].any()
    assert moved[first]
    generated = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE_TOKEN, VIDEO_TOKEN],
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    torch.testing.assert_close(generated.logits[0][0], changed[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", WITH_VIDEO)
def test_video_tokens_lie_over_the_cells_they_were_pooled_from(host: str) -> None:
    """The host pools coordinates of cells in place of features; a token's are the middle of the cells under it."""
    model = build(host, "siglip")
    attach_vision_remember(model, [0])
    at = "vision_resampler" if host == "llava_next_video" else "multi_modal_projector"
    rows, columns = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    coordinates = torch.stack([rows, columns], -1).view(49, 2)

    def place(_: Any, args: Any) -> Any:
        made = torch.zeros_like(args[0])
        made[..., :2] = coordinates
        return (made, *args[1:])

    module = getattr(model.model, at)
    if at == "multi_modal_projector":
        hook = module.register_forward_hook(lambda _, args, output: place(_, (output,))[0])
    else:
        hook = module.register_forward_pre_hook(place)
    tail = None
    if at == "vision_resampler":  # what the resampler makes has to survive the projector
        kept: list[torch.Tensor] = []
        module.register_forward_hook(lambda _, args, output: kept.append(output))
        tail = model.model.multi_modal_projector.register_forward_hook(
            lambda _, args, output: torch.nn.functional.pad(kept[-1], (0, output.shape[-1] - kept[-1].shape[-1]))
        )
    side = model.config.vision_config.image_size
    try:
        with torch.no_grad():
            output = model.model.get_video_features(pixel_values_videos=torch.randn(1, 2, 3, side, side))
    finally:
        hook.remove()
        if tail is not None:
            tail.remove()
    (memory,) = rows_of(output)[0].memory
    h, w = memory.token_grid
    tokens = output.pooler_output[0][: 2 * h * w, :2].view(2, h, w, 2)
    for i, j in itertools.product(range(h), range(w)):
        for axis, place_of in ((0, i), (1, j)):
            start, stop = region(place_of, place_of + 1, (h, w)[axis], 7)
            middle = (start + stop - 1) / 2
            assert (tokens[:, i, j, axis] - middle).abs().max() <= 0.5 + 1e-4, (i, j)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 9}, {"num_beams": 3}, {"cache_implementation": "static"}],
)
@every_host
def test_generate_equals_the_samples_one_by_one(host: str, options: dict[str, Any]) -> None:
    if "prefill_chunk_size" in options:
        skip_if_the_host_fails("chunked prefill")
    model = build(host)
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


@every_host
def test_gradients_reach_every_parameter_of_the_blocks(host: str) -> None:
    model = build(host).train()
    handle = attach_vision_remember(model, [1, 3], window=2)  # uncompressed, so more than one cell to choose from
    randomise(handle)
    inputs = prompt(model, GROUPS)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.module.parameters())
