"""Invariants 3 and 4: a sample depends on its own images alone, a call on its own inputs alone."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch

from tests.hosts import PAD_TOKEN, PAIRINGS, batch, build_llava, randomise
from tests.test_generate import singles
from vision_remember import attach_vision_remember
from vision_remember.adapters.attachment import find_attachment

COUNTS = (1, 2, 0)


def attached(decoder: str = "qwen2", encoder: str = "clip", *, seed: int = 0) -> Any:
    model = build_llava(decoder, encoder, seed=seed)
    randomise(attach_vision_remember(model, [1, 3]))
    return model


def run(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs, position_ids=positions).logits


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("decoder", "encoder"), PAIRINGS)
def test_a_padded_batch_equals_its_samples_one_by_one(decoder: str, encoder: str, padding: str) -> None:
    model = attached(decoder, encoder)
    inputs = batch(model, COUNTS, padding=padding)
    together = run(model, inputs)
    for row, (logits, ids) in zip(
        singles(inputs, COUNTS), zip(together, inputs["input_ids"], strict=True), strict=True
    ):
        torch.testing.assert_close(logits[ids != PAD_TOKEN], run(model, row)[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(("decoder", "encoder"), PAIRINGS)
def test_another_image_in_one_sample_changes_no_other_sample(decoder: str, encoder: str) -> None:
    model = attached(decoder, encoder)
    inputs = batch(model, (1, 1, 0))
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][0] += 1
    before, after = run(model, inputs), run(model, changed)
    assert torch.equal(before[1:], after[1:])
    assert not torch.allclose(before[0], after[0], atol=0.1)


@pytest.mark.parametrize(("decoder", "encoder"), PAIRINGS)
def test_no_call_sees_the_features_of_another(decoder: str, encoder: str) -> None:
    model = attached(decoder, encoder)
    first, second, text = batch(model, (1,)), batch(model, (2,), seed=1), batch(model, (0,), seed=2)
    expected = [run(copy.deepcopy(model), inputs) for inputs in (first, second, text)]
    for order in ((0, 1, 2), (2, 0, 2), (1, 0, 1)):
        for index in order:
            assert torch.equal(run(model, (first, second, text)[index]), expected[index])


def test_an_exception_in_mid_forward_leaves_nothing_behind() -> None:
    model = attached()
    inputs, other = batch(model, (1,)), batch(model, (2,), seed=1)
    expected, text = run(model, inputs), run(model, batch(model, (0,)))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    for module in (model.model.vision_tower, model.model.language_model.layers[2]):
        handle = module.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(model, other)
        handle.remove()
        assert torch.equal(run(model, batch(model, (0,))), text)
        assert torch.equal(run(model, inputs), expected)


def test_two_models_and_four_threads_do_not_mix() -> None:
    models = [attached(), attached(seed=5)]
    inputs = [batch(models[0], (count,), seed=count) for count in (1, 2, 3)]
    expected = {(m, i): run(models[m], inputs[i]) for m in range(2) for i in range(3)}
    wrong: list[Any] = []

    def work(offset: int) -> None:
        for step in range(12):
            key = ((step + offset) % 2, (step * 2 + offset) % 3)
            try:
                # Other threads change how sums are split, so the last bits may differ.
                torch.testing.assert_close(run(models[key[0]], inputs[key[1]]), expected[key], atol=1e-4, rtol=1e-4)
            except Exception as error:
                wrong.append((key, error))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_copy_is_a_model_of_its_own() -> None:
    model = attached()
    inputs = batch(model)
    expected = run(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, inputs), expected)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "vision_remember" in name or "vision_tower" in name:
                parameter.mul_(0.5)
    assert torch.equal(run(model, inputs), expected)
    assert not torch.allclose(run(twin, inputs), expected, atol=0.01)


def test_a_pickled_model_comes_back_attached() -> None:
    model = attached()  # before any forward: afterwards a LLaVA cannot be pickled, attached or not
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    inputs = batch(model)
    assert torch.equal(run(twin, inputs), run(model, inputs))


def test_a_model_that_was_pickled_before_there_were_side_streams_runs() -> None:
    model = attached()
    attachment = find_attachment(model)
    attachment.side_stream = True
    del attachment.side_stream
    assert attachment.side_stream is False
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    old = torch.load(file, weights_only=False)
    inputs = batch(model)
    assert torch.equal(run(old, inputs), run(attached(), inputs))
