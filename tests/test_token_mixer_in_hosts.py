"""The token mixer inside hosts: which tokens it sees, and what the text-guided one is told of the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hosts import IMAGE_TOKEN, batch, build_llava, randomise
from tests.test_custom_host import SPEC
from tests.test_custom_host import build as build_custom
from tests.test_custom_host import inputs as custom_inputs
from tests.test_tiled_hosts import build as build_tiled
from tests.test_tiled_hosts import prompt
from vision_remember import VisionRemember, attach_vision_remember
from vision_remember.adapters.transport import rows_of
from vision_remember.layout import VisionLayout
from vision_remember.memory import Recall, VisionMemory

every_mixer = pytest.mark.parametrize("mixer", ["self", "text_guided"])


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@every_mixer
def test_it_starts_as_an_identity_and_then_matters(mixer: str) -> None:
    model = build_llava()
    inputs = batch(model)
    expected = logits(model, inputs)
    handle = attach_vision_remember(model, [1, 2], token_mixer=mixer)
    assert torch.equal(logits(model, inputs), expected)
    randomise(handle)
    changed = logits(model, inputs)
    assert not torch.allclose(changed, expected, atol=0.1)
    for block in handle.module.values():
        torch.nn.init.zeros_(block.token_mixer.vr_out.weight)
        torch.nn.init.zeros_(block.token_mixer.vr_out.bias)
    assert not torch.allclose(logits(model, inputs), changed, atol=1e-2)


@every_mixer
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_batch_equals_its_samples_one_by_one(mixer: str, padding: str) -> None:
    model = build_llava()
    randomise(attach_vision_remember(model, [1, 2], token_mixer=mixer))
    together = batch(model, (1, 2, 0), padding=padding)
    whole = logits(model, together)
    taken = 0
    for row, count in enumerate((1, 2, 0)):
        kept = together["attention_mask"][row].bool()
        alone = {"input_ids": together["input_ids"][row][kept][None]}
        if count:
            alone["pixel_values"] = together["pixel_values"][taken : taken + count]
        taken += count
        torch.testing.assert_close(logits(model, alone)[0], whole[row][kept], rtol=1e-4, atol=1e-4)


@every_mixer
def test_generation_equals_the_full_forward(mixer: str) -> None:
    model = build_llava()
    randomise(attach_vision_remember(model, [1, 2], token_mixer=mixer))
    inputs = batch(model, (1, 2))
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE_TOKEN])
    for step in range(3):
        ids = made[:, : inputs["input_ids"].shape[1] + step]
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(2, step)], 1)
        full = logits(model, {**inputs, "input_ids": ids, "attention_mask": mask})[:, -1]
        full[:, IMAGE_TOKEN] = -torch.inf
        assert torch.equal(full.argmax(-1), made[:, ids.shape[1]])


@every_mixer
def test_text_behind_an_image_never_reaches_its_tokens(mixer: str) -> None:
    model = build_llava()
    randomise(attach_vision_remember(model, [1, 2], token_mixer=mixer))
    inputs = batch(model, (1,))
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, -1] += 1
    moved = (logits(model, inputs) - logits(model, other)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] * (moved.numel() - 1) + [True]


def test_text_in_front_of_an_image_guides_the_text_guided_one() -> None:
    """By the attention of a decoder it reaches the image's tokens too: the blocks alone are looked at."""
    model = build_llava()
    handle = attach_vision_remember(model, [0], token_mixer="text_guided")
    randomise(handle)
    told: list[Tensor] = []
    handle.module["0"].token_mixer.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["text"]), with_kwargs=True
    )
    inputs = batch(model, (2, 1))
    logits(model, inputs)
    (text,) = told
    states = model.get_input_embeddings()(inputs["input_ids"]).detach()
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    expected = []
    for row, images in ((0, 2), (1, 1)):
        starts = [
            at for at in range(1, ids.shape[1]) if ids[row, at] == IMAGE_TOKEN and ids[row, at - 1] != IMAGE_TOKEN
        ]
        assert len(starts) == images
        for start in starts:
            front = mask[row, :start] & (ids[row, :start] != IMAGE_TOKEN)
            expected.append(states[row, :start][front].mean(0))
    torch.testing.assert_close(text, torch.stack(expected))


def test_places_without_a_token_are_not_mixed_in() -> None:
    """Unpadding drops tokens of tiles: what stands in their places, zeros, must not move the others."""
    model = build_tiled()
    handle = attach_vision_remember(model, [0], token_mixer="self")
    randomise(handle)
    seen: list[Tensor | None] = []
    handle.module["0"].token_mixer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["present"]), with_kwargs=True
    )
    inputs = prompt(model, [[(40, 61), (90, 33)]])
    logits(model, inputs)
    (present,) = seen
    assert present is not None
    assert not present.all()
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    ((memory,),) = {rows.memory for rows in rows_of(model.model.get_image_features(**images))}
    assert memory.slots is not None
    assert present.flatten().nonzero().flatten().tolist() == sorted(memory.slots[memory.slots >= 0].tolist())


def test_a_hand_written_model_tells_it_the_text_too() -> None:
    model = build_custom()
    randomise(attach_vision_remember(model, [1], spec=SPEC, token_grid=(4, 4), token_mixer="text_guided"))
    inputs = custom_inputs()
    first = logits(model, inputs)
    again = {**inputs, "input_ids": inputs["input_ids"].clone()}
    again["input_ids"][:, 0] += 1
    assert not torch.allclose(logits(model, again)[:, 1:], first[:, 1:], atol=1e-3)
    model.train()
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.mouth.model.layers[1].vision_remember.parameters())


def test_the_mean_of_the_text_in_front_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 3, generator=generator)
    text = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    # Row 0: tiles at 3..4 and 6..7; row 1: a tile at 5..6, its tokens in another order, and one at 0..1 with no text.
    positions = torch.tensor([3, 4, 6, 7, 15, 14, 9, 10])
    layout = VisionLayout(positions, torch.arange(8), 4, (1, 2))
    expected = [hidden[0, 1:3].mean(0), hidden[0, [1, 2, 5]].mean(0), hidden[1, 3:5].mean(0), torch.zeros(3)]
    torch.testing.assert_close(layout.text_before(hidden, text), torch.stack(expected))
    everything = VisionLayout(positions, None, 4, (1, 2))
    assert torch.equal(everything.text_before(hidden, text), layout.text_before(hidden, text))
    assert everything.present(hidden.device) is None
    part = VisionLayout(positions[:3], torch.tensor([0, 3, 8]), 4, (1, 2))
    present = part.present(hidden.device)
    assert present is not None
    assert present.tolist() == [[True, False], [False, True], [False, False], [False, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_mean_of_a_long_text_stays_in_range(dtype: torch.dtype) -> None:
    """A decoder's states hold a few large numbers, whose sum over a long text is more than float16 holds."""
    hidden = torch.randn(1, 404, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden[..., 0] += 2000
    text = torch.ones(1, 404, dtype=torch.bool)
    text[0, 400:] = False
    layout = VisionLayout(torch.arange(400, 404), None, 1, (2, 2))
    expected = hidden[:, :400].double().mean(1).to(dtype)
    torch.testing.assert_close(layout.text_before(hidden, text), expected)


def test_what_padding_holds_is_no_part_of_the_mean() -> None:
    hidden = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0))
    hidden[0, 0] = torch.nan
    text = torch.tensor([[False, True, True] + [False] * 5])
    layout = VisionLayout(torch.arange(4, 8), None, 1, (2, 2))
    torch.testing.assert_close(layout.text_before(hidden, text), hidden[:, 1:3].mean(1))


@every_mixer
def test_a_block_on_another_device_than_the_layout(mixer: str) -> None:
    """The meta device is the other one: it computes no numbers, but it refuses tensors of another."""
    block = VisionRemember(8, 6, token_mixer=mixer).to("meta")
    layout = VisionLayout(torch.arange(4, 11), torch.arange(1, 8), 2, (2, 2))
    memory = VisionMemory((torch.randn(2, 16, 6),), None, (4, 4), (2, 2), ())
    recall = Recall(((memory, layout),), torch.ones(1, 12, dtype=torch.bool))
    assert recall.through(block, torch.empty(1, 12, 8, device="meta")).shape == (1, 12, 8)
