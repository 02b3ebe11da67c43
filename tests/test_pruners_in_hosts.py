"""Pruners in whole models: what they compute is what a model computes from which the dropped tokens are hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import pruning_oracle as oracle
from tests import pruning_reference as reference
from tests import test_tiled_hosts as tiled
from tests.fingerprint import Fingerprint
from tests.hosts import IMAGE_TOKEN
from tests.pruning_hosts import DECODERS, HOSTS, build, logits, prompt, row_of
from tests.pruning_reference import top
from vision_remember import PRUNERS, attach_pruner

STEPS = 4
GREEDY: dict[str, Any] = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    "suppress_tokens": [IMAGE_TOKEN],
    "output_logits": True,
    "return_dict_in_generate": True,
}
CLOSE = {"atol": 2e-4, "rtol": 2e-4}

SMALL: dict[str, dict[str, Any]] = {
    "faster_vlm": {"keep": 0.3},
    "fastv": {},
    "prumerge": {},
    "prumerge_plus": {},
    "pyramid_drop": {},
    "random": {},
    "sparse_vlm": {},
    "tome": {},
    "uniform": {},
    "vision_zip": {"dominant": 5, "contextual": 0.2},
}
"""Options that fit the small hosts."""
REFUSED = {("internvl", "tome")}

every_host = pytest.mark.parametrize(("host", "decoder"), [(host, decoder) for host in HOSTS for decoder in DECODERS])


def fastv(keep: float) -> oracle.Choose:
    return lambda stage, attention, members, initial: top(
        attention.mean(0)[-1], members, max(min(initial, 1), round(initial * keep))
    )


def pyramid(keep: list[float]) -> oracle.Choose:
    return lambda stage, attention, members, initial: top(
        attention.mean(0)[-1], members, max(min(initial, 1), round(initial * keep[stage]))
    )


DECODER_SIDE: dict[str, tuple[dict[str, Any], list[tuple[int, int | None]], oracle.Choose]] = {
    "fastv": ({"layer": 2, "keep": 0.4}, [(2, 1)], fastv(0.4)),
    "pyramid_drop": (
        {"layers": (1, 2, 3), "keep": (0.5, 0.3, 0.1)},
        [(1, 1), (2, 2), (3, 3)],
        pyramid([0.5, 0.3, 0.1]),
    ),
}


def faster(attention: Tensor, keys: Tensor, features: Tensor) -> tuple[list[int], dict[int, Tensor]]:
    return top(attention, torch.arange(len(attention)), round(0.3 * len(attention))), {}


ENCODER_SIDE: dict[str, tuple[dict[str, Any], oracle.Select, bool]] = {
    "faster_vlm": ({"keep": 0.3}, faster, True),
    "vision_zip": ({"dominant": 5, "contextual": 3}, reference.vision_zip(5, 3), True),
    "prumerge": ({"neighbours": 6}, reference.prumerge(6, spread=False), False),
    "prumerge_plus": ({"neighbours": 6}, reference.prumerge(6, spread=True), False),
}
every_encoder_pruner = pytest.mark.parametrize("name", ENCODER_SIDE)
every_reader = pytest.mark.parametrize("name", DECODER_SIDE)


def expected(model: Any, inputs: dict[str, Any], name: str) -> dict[int, Tensor]:
    return oracle.survivors(model, inputs, *DECODER_SIDE[name][1:])


@every_reader
@every_host
def test_dropping_equals_hiding(host: str, decoder: str, name: str) -> None:
    model = build(host, decoder)
    inputs = prompt(model)
    alive = expected(model, inputs, name)
    wanted = oracle.run(model, inputs, alive).logits
    before = logits(model, inputs)
    handle = attach_pruner(model, name, **DECODER_SIDE[name][0])
    found = logits(model, inputs)
    here = alive[max(alive)] & inputs["attention_mask"].bool()
    torch.testing.assert_close(found[here], wanted[here], **CLOSE)
    assert found.shape == before.shape
    assert not torch.allclose(found[:, -1], before[:, -1], atol=1e-2)
    vision = inputs["input_ids"] == IMAGE_TOKEN
    for layer, left in alive.items():
        assert handle.tokens_per_layer is not None
        assert torch.equal(handle.tokens_per_layer[layer], (left & vision).sum(1))


@every_reader
@every_host
def test_generating_with_a_cache_equals_hiding_in_full_forwards(host: str, decoder: str, name: str) -> None:
    model = build(host, decoder)
    inputs = prompt(model)
    tokens, wanted = oracle.continued(model, inputs, expected(model, inputs, name), STEPS)
    attach_pruner(model, name, **DECODER_SIDE[name][0])
    out = model.generate(**inputs, **GREEDY)
    torch.testing.assert_close(torch.stack(out.logits, 1), wanted, **CLOSE)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)


@every_encoder_pruner
@every_host
def test_choosing_in_the_encoder_equals_hiding_what_was_not_chosen(host: str, decoder: str, name: str) -> None:
    model = build(host, decoder)
    inputs = prompt(model)
    options, select, heads = ENCODER_SIDE[name]
    with oracle.rewritten(model, inputs, select, heads=heads) as alive:
        wanted = oracle.run(model, inputs, alive).logits
        tokens, steps = oracle.continued(model, inputs, alive, STEPS)
    before = logits(model, inputs)
    handle = attach_pruner(model, name, **options)
    found = logits(model, inputs)
    here = alive[0] & inputs["attention_mask"].bool()
    torch.testing.assert_close(found[here], wanted[here], **CLOSE)
    assert not torch.allclose(found[:2, -1], before[:2, -1], atol=1e-2)
    torch.testing.assert_close(found[2][here[2]], before[2][here[2]], **CLOSE)
    vision = inputs["input_ids"] == IMAGE_TOKEN
    assert handle.tokens_per_layer is not None
    assert torch.equal(handle.tokens_per_layer, (alive[0] & vision).sum(1).expand(4, -1))
    out = model.generate(**inputs, **GREEDY)
    torch.testing.assert_close(torch.stack(out.logits, 1), steps, **CLOSE)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)


@every_reader
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_batch_equals_its_rows_one_by_one(host: str, padding: str, name: str) -> None:
    model = build(host)
    counts = (1, 2, 0)
    inputs = prompt(model, counts, padding=padding)
    attach_pruner(model, name, **DECODER_SIDE[name][0])
    together = logits(model, inputs)
    for row in range(len(counts)):
        alone = logits(model, row_of(model, inputs, counts, row))[0]
        here = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][here], alone, **CLOSE)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("host", HOSTS)
def test_detach_gives_the_host_back(host: str, name: str) -> None:
    if (host, name) in REFUSED:
        pytest.skip("refused, as test_tome_needs_a_token_for_each_patch shows")
    model = build(host)
    inputs = prompt(model)
    before = logits(model, inputs)
    state = Fingerprint(model)
    handle = attach_pruner(model, name, **SMALL[name])
    assert not torch.allclose(logits(model, inputs), before, atol=1e-2)
    with handle.disabled():
        assert torch.equal(logits(model, inputs), before)
    handle.detach()
    state.check(model)
    assert torch.equal(logits(model, inputs), before)
    handle.detach()
    assert "detached" in repr(handle)


@pytest.mark.parametrize("name", ["faster_vlm", "vision_zip", "tome", "uniform"])
@pytest.mark.parametrize("images", [[], [(40, 61), (90, 80)]], ids=["video", "images and video"])
@pytest.mark.parametrize("host", tiled.WITH_VIDEO)
def test_pruners_of_the_encoder_leave_video_whole(host: str, images: list[tuple[int, int]], name: str) -> None:
    """Those of the decoder do not; in a forward pass and in generate(), which encodes ahead."""
    model = tiled.build(host)
    inputs = tiled.video_prompt(model, 3, images)
    before = logits(model, inputs)
    handle = attach_pruner(model, name, **SMALL[name])
    found = logits(model, inputs)
    left = handle.tokens_per_layer
    assert left is not None
    total, video = (int((inputs["input_ids"] == token).sum()) for token in (IMAGE_TOKEN, tiled.VIDEO_TOKEN))
    if name == "uniform":
        assert left[0, 0] == round((total + video) * 0.5)
    elif images:
        assert video < left[0, 0] < total * 0.7 + video
    else:
        assert left[0, 0] == video
        assert torch.equal(found, before)
    options = {**GREEDY, "suppress_tokens": [IMAGE_TOKEN, tiled.VIDEO_TOKEN]}
    first = model.generate(**inputs, **options).logits[0]
    torch.testing.assert_close(first, found[:, -1], **CLOSE)


@pytest.mark.parametrize("name", ["faster_vlm", "tome"])
def test_features_of_another_level_than_when_attached_are_refused(name: str) -> None:
    """The attention of one block would choose among, or be merged for, the features of another."""
    model = build("llava")
    inputs = prompt(model)
    own = model.config.vision_feature_layer
    attach_pruner(model, name, **SMALL[name])
    expected = logits(model, inputs)
    assert torch.equal(logits(model, inputs, vision_feature_layer=own), expected)
    message = "the features of encoder level 4 are asked for, and the pruner was attached to those of level 5"
    with pytest.raises(ValueError, match=message):
        logits(model, inputs, vision_feature_layer=-3)
    with pytest.raises(ValueError, match=message):
        model.model.get_image_features(inputs["pixel_values"], -3)
    model.config.vision_feature_layer = -3
    with pytest.raises(ValueError, match=message):
        logits(model, inputs)
