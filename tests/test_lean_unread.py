"""Encoder blocks that nobody reads do not run while a host encodes, and everybody who asks gets all that there is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf

from tests.fingerprint import Fingerprint
from tests.hosts import ENCODER_CONFIGS, batch, build_llava, randomise, set_checkpointing
from tests.launches import Launches
from vision_remember import attach_vision_remember, compress_projector, detach_vision_remember
from vision_remember.tap import MultiLevelTap

DEPTH = 6
GENERATE: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def blocks(model: Any) -> list[torch.nn.Module]:
    return list(model.model.vision_tower.encoder.layers)


@contextmanager
def recorded(model: Any) -> Iterator[list[int]]:
    """The encoder blocks whose MLP runs inside the ``with``, in order."""
    ran: list[int] = []
    hooks = [
        block.mlp.register_forward_hook(lambda module, args, output, number=number: ran.append(number))
        for number, block in enumerate(blocks(model))
    ]
    yield ran
    for hook in hooks:
        hook.remove()


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("levels", "layer", "expected"),
    [((2, 4), -2, 5), ((2, 4), 3, 4), ((1, 2), [1, 3], 3), ((2, 6), -2, 6), ((1,), -1, 6), ((0,), 1, 1)],
)
def test_a_forward_pass_runs_blocks_up_to_the_last_that_is_read(
    encoder: str, levels: tuple[int, ...], layer: Any, expected: int
) -> None:
    model = build_llava("qwen2", encoder)
    if isinstance(layer, list):
        pair = torch.nn.Linear(32 * len(layer), 48)
        model.model.multi_modal_projector.linear_1 = pair
    model.config.vision_feature_layer = model.model.config.vision_feature_layer = layer
    inputs = batch(model)
    plain, generated = logits(model, **inputs), model.generate(**inputs, **GENERATE)
    saliency = None if levels == (0,) else "received"
    attach_vision_remember(model, [1, 3], levels=levels, saliency=saliency)
    with recorded(model) as ran:
        assert torch.equal(logits(model, **inputs), plain)
    assert ran == list(range(expected))
    with recorded(model) as ran:
        assert torch.equal(model.generate(**inputs, **GENERATE), generated)
    assert ran == list(range(expected))


def test_an_argument_of_the_call_goes_before_the_configuration() -> None:
    model = build_llava()
    inputs = batch(model)
    plain = logits(model, **inputs, vision_feature_layer=-1)
    attach_vision_remember(model, [1, 3], levels=(2, 4))
    with recorded(model) as ran:
        assert torch.equal(logits(model, **inputs, vision_feature_layer=-1), plain)
    assert ran == list(range(DEPTH))


def test_whoever_asks_for_the_encoders_output_gets_all_of_it() -> None:
    model = build_llava()
    pixels = batch(model)["pixel_values"]

    def asked() -> list[Any]:
        with torch.no_grad():
            features = model.get_image_features(pixels, output_hidden_states=True)
            alone = model.model.vision_tower(pixels, output_hidden_states=True)
        return [features.last_hidden_state, alone.last_hidden_state, *features.hidden_states, *alone.hidden_states]

    expected = asked()
    attach_vision_remember(model, [1, 3], levels=(2, 4))
    logits(model, **batch(model))
    with recorded(model) as ran:
        found = asked()
    assert ran == 2 * list(range(DEPTH))
    assert len(found) == len(expected) == 2 * (DEPTH + 2)
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))


def test_the_features_are_those_of_a_whole_run() -> None:
    """Levels and saliency that the blocks read, against a tap on an encoder that runs to its end."""
    model = build_llava()
    inputs = batch(model, (2,))
    handle = attach_vision_remember(model, [1, 3], levels=(2, 4))
    seen: dict[str, Any] = {}
    handle.module["1"].forward = lambda tokens, features, **given: seen.update(given, features=features) or tokens
    logits(model, **inputs)
    variant = handle.config.saliency_variant
    tap = MultiLevelTap(copy.deepcopy(model.model.vision_tower), (2, 4), variant=variant, center="mean")
    with tap.capture() as captured, torch.no_grad():
        tap.encoder(inputs["pixel_values"])
    assert all(torch.equal(own, other) for own, other in zip(seen["features"], captured.levels, strict=True))
    assert torch.equal(seen["saliency"], captured.saliency)


def test_disabled_detached_and_copied_models_run_as_they_should() -> None:
    model = build_llava()
    inputs = batch(model)
    plain = logits(model, **inputs)
    before = Fingerprint(model)
    handle = attach_vision_remember(model, [1, 3], levels=(2, 4))
    randomise(handle)
    remembered = logits(model, **inputs)
    with handle.disabled(), recorded(model) as ran:
        assert torch.equal(logits(model, **inputs), plain)
    assert ran == list(range(DEPTH))
    twin = copy.deepcopy(model)
    detach_vision_remember(model)
    before.check(model)
    for own, expected, last in ((model, plain, DEPTH), (twin, remembered, DEPTH - 1)):
        with recorded(own) as ran:
            assert torch.equal(logits(own, **inputs), expected)
            own.generate(**inputs, **GENERATE)
        assert ran == 2 * list(range(last))
    detach_vision_remember(twin)
    assert not any("forward" in block.__dict__ for own in (model, twin) for block in blocks(own))


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_an_encoder_that_trains_gets_the_gradients_of_a_whole_run(use_reentrant: bool | None) -> None:
    def gradients(levels: tuple[int, ...]) -> dict[str, Any]:
        model = build_llava().train()
        handle = attach_vision_remember(model, [1, 3], levels=levels, saliency=None)
        randomise(handle)
        if use_reentrant is not None:
            set_checkpointing(model, use_reentrant=use_reentrant)
        inputs = batch(model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad for name, p in model.model.vision_tower.named_parameters()}

    def whole_run() -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vision_remember.adapters.unread._ENCODERS", ())
            return gradients((2, 4))

    own, expected = gradients((2, 4)), whole_run()
    assert any(gradient is not None and gradient.any() for gradient in own.values())
    for name, gradient in expected.items():
        assert (own[name] is None) == (gradient is None)
        assert gradient is None or torch.equal(own[name], gradient)


def test_a_projector_of_ours_has_the_levels_that_it_asks_for() -> None:
    """It changes the configuration, which is read in each call."""
    model = build_llava()
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    inputs = batch(model)
    plain = logits(model, **inputs)
    attach_vision_remember(model, [1, 3], levels=(2, 4))
    with recorded(model) as ran:
        assert torch.equal(logits(model, **inputs), plain)
    assert ran == list(range(DEPTH - 1))


def test_no_tensor_relates_every_cell_to_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the encoder's fused attention, nor the capture of levels and saliency, nor the blocks hold such a map."""
    sizes = {**ENCODER_CONFIGS["clip"]().to_dict(), "image_size": 44}  # 121 cells: no width is as large
    monkeypatch.setitem(ENCODER_CONFIGS, "clip", lambda: hf.CLIPVisionConfig(**sizes))
    model = build_llava()
    inputs = batch(model, (1,))
    attach_vision_remember(model, [1, 3], levels=(2, 4))
    logits(model, **inputs)

    def maps() -> set[tuple[int, ...]]:
        with Launches() as launches:
            logits(model, **inputs)
        return {shape for shape in launches.shapes if sum(side in (121, 122) for side in shape) > 1}

    assert not maps()
    model.model.vision_tower.set_attn_implementation("eager")
    assert maps(), "the scan sees a map where there is one"
