"""A hand-written model, no transformers VLM, with Vision Remember by a spec: its forward takes raw pixels only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.fingerprint import Fingerprint
from tests.hosts import CACHE, DECODER_CONFIGS, ENCODER_CONFIGS, IMAGE_TOKEN, randomise
from vision_remember import (
    MLLMSpec,
    attach_vision_remember,
    compress_projector,
    detach_vision_remember,
    load_vision_remember,
)

SPEC = MLLMSpec(
    name="mine",
    base="",
    encoder="eyes",
    projector="bridge",
    decoder="mouth.model",
    image_token_id="placeholder",
    plain=True,
)


class Mine(nn.Module):
    placeholder = IMAGE_TOKEN

    def __init__(self, decoder: str = "qwen2") -> None:
        super().__init__()
        self.eyes = hf.CLIPVisionModel(ENCODER_CONFIGS["clip"]())
        self.mouth = hf.AutoModelForCausalLM.from_config(DECODER_CONFIGS[decoder]())
        self.bridge = nn.Linear(32, 48)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        patches = self.eyes(pixel_values).last_hidden_state[:, 1:]
        return self.bridge(patches.unflatten(1, (4, 2, 4, 2)).mean((2, 4)).flatten(1, 2))

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, fail: bool = False, **kwargs: Any) -> Any:
        embeddings = self.mouth.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            tokens = self.get_image_features(pixel_values)
            if fail:
                raise RuntimeError("in mid-forward")
            embeddings = embeddings.masked_scatter((input_ids == self.placeholder)[..., None], tokens)
        return self.mouth(inputs_embeds=embeddings, **kwargs)


def build(decoder: str = "qwen2") -> Any:
    torch.manual_seed(0)
    model = Mine(decoder).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def attach(model: Any) -> Any:
    return attach_vision_remember(model, [1, 3], spec=SPEC, token_grid=(4, 4))


def trained() -> Any:
    model = build()
    randomise(attach(model))
    return model


def inputs(images: int = 2, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.tensor([[3] + [IMAGE_TOKEN] * 16 + [4, 5, 6]] * images)
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed)),
    }


def logits(model: Any, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("decoder", DECODER_CONFIGS)
def test_identity_effect_and_detach(decoder: str) -> None:
    model = build(decoder)
    expected = logits(model, **inputs())
    before = Fingerprint(model)
    handle = attach(model)
    assert torch.equal(logits(model, **inputs()), expected)
    randomise(handle)
    changed = logits(model, **inputs())
    assert not torch.allclose(changed, expected, atol=0.1)
    assert torch.equal(changed[:, 0], expected[:, 0])
    with handle.disabled():
        assert torch.equal(logits(model, **inputs()), expected)
    detach_vision_remember(model)
    before.check(model)
    assert torch.equal(logits(model, **inputs()), expected)


def test_each_token_re_reads_its_own_cells() -> None:
    model = build()
    handle = attach(model)
    seen: dict[str, Any] = {}
    handle.module["1"].forward = lambda tokens, features, **grids: seen.update(grids, features=features) or tokens
    logits(model, **inputs())
    with torch.no_grad():
        states = model.eyes(inputs()["pixel_values"], output_hidden_states=True).hidden_states
    assert (seen["token_grid"], seen["feature_grid"]) == ((4, 4), (8, 8))
    for features, level in zip(seen["features"], handle.config.levels, strict=True):
        torch.testing.assert_close(features, states[level][:, 1:])


def test_steps_with_a_cache_equal_the_full_forward() -> None:
    model = build()
    randomise(attach(model))
    given = inputs()
    with torch.no_grad():
        first = model(**given, use_cache=True)
        step = model(input_ids=torch.tensor([[7], [8]]), **{CACHE: first[CACHE]}, use_cache=True)
    longer = {**given, "input_ids": torch.cat([given["input_ids"], torch.tensor([[7], [8]])], 1)}
    torch.testing.assert_close(step.logits[:, -1], logits(model, **longer)[:, -1], rtol=1e-4, atol=1e-5)


def test_nothing_is_left_of_a_pass_that_failed_or_of_another_image() -> None:
    model, fresh = trained(), trained()
    with pytest.raises(RuntimeError, match="mid-forward"):
        model(**inputs(seed=1), fail=True)
    text = {"input_ids": torch.tensor([[3, IMAGE_TOKEN, 4]])}
    assert torch.equal(logits(model, **text), logits(fresh, **text))
    logits(model, **inputs(seed=2))
    assert torch.equal(logits(model, **inputs()), logits(fresh, **inputs()))
    assert torch.equal(logits(copy.deepcopy(model), **inputs()), logits(fresh, **inputs()))


def test_features_asked_for_outside_a_pass_are_the_models_own() -> None:
    model = build()
    expected = model.get_image_features(inputs()["pixel_values"])
    attach(model)
    assert torch.equal(model.get_image_features(inputs()["pixel_values"]), expected)


@pytest.mark.parametrize("given", [inputs(), {"input_ids": torch.tensor([[3, 4, 5]])}], ids=["images", "text"])
def test_every_parameter_of_the_blocks_takes_part_in_training(given: dict[str, Tensor]) -> None:
    model = build().train()
    handle = attach(model)
    randomise(handle)
    model(**given).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in handle.module.parameters())
    moved = [bool(parameter.grad.any()) for parameter in handle.module.parameters()]
    assert all(moved) if "pixel_values" in given else not any(moved)


def test_save_and_load(tmp_path: Path) -> None:
    model, fresh = build(), build()
    handle = attach(model)
    randomise(handle)
    handle.save_pretrained(tmp_path)
    load_vision_remember(fresh, tmp_path)
    assert torch.equal(logits(fresh, **inputs()), logits(model, **inputs()))


class TokenPerCell(Mine):
    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.bridge(self.eyes(pixel_values).last_hidden_state[:, 1:])


def test_its_projector_is_compressed_saved_and_restored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TokenPerCell().eval()
    before, fresh = Fingerprint(model), copy.deepcopy(model)
    compression = compress_projector(model, None, "adaptive_avg_pool", ratio=4, spec=SPEC)
    handle = attach_vision_remember(model, [1, 3], spec=SPEC)
    randomise(handle)
    expected = logits(model, **inputs())
    handle.save_pretrained(tmp_path)
    compress_projector(
        fresh, None, "adaptive_avg_pool", ratio=4, spec=SPEC
    )  # without a processor loading leaves it to us
    load_vision_remember(fresh, tmp_path)
    assert torch.equal(logits(fresh, **inputs()), expected)
    handle.detach()
    compression.restore()
    before.check(model)
    assert not hasattr(model, "config")


def test_cells_that_form_no_square_are_not_compressed() -> None:
    model = TokenPerCell()
    model.eyes.config.image_size = (32, 64)
    before = Fingerprint(model)
    with pytest.raises(ValueError, match="TokenPerCell hands its projector 8x16 cells without their grid"):
        compress_projector(model, None, "adaptive_avg_pool", ratio=4, spec=SPEC)
    before.check(model)
