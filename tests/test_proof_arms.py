"""The proof's arms: what runs on cached features is what the model itself computes from pixels."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.proof.arms import Arm, ArmSpec, Pretrained, build_arm
from benchmarks.proof.encoder import encode, kept_levels
from benchmarks.proof.insight import look_inside
from benchmarks.proof.levels import GPU, TINY, Level
from benchmarks.proof.model import TokenPlaces, build_model
from benchmarks.proof.pages import VALIDATION_FROM, build_pages, build_words, task_names
from benchmarks.proof.prompts import prompts
from benchmarks.proof.rivals import RIVALS, asked_alone, pruned, windows_as_masks
from benchmarks.proof.suites import INTERACTION_SALIENCIES, SEARCHED, SUITES, distinct
from benchmarks.proof.times import absorbed, measure
from benchmarks.proof.train import Set, World, arm_logits, evaluate, run
from benchmarks.proof.words import IGNORE, Streams
from examples.demo.schedule import Recipe, optimise

LEVEL = replace(TINY, tasks=("attribute", "characters"), test_pages=2)
ARMS = distinct([arm for arms in [*SUITES.values(), SEARCHED, INTERACTION_SALIENCIES] for arm in arms])


def world_of(level: Level, pages: int) -> World:
    """A world of random weights."""
    words = build_words(level)
    model = build_model(level.shape, len(words), 3)
    places = TokenPlaces(level.shape.grid, level.shape.text_width)
    pretrained = dict.fromkeys((2, 3, 4), Pretrained(model.state_dict(), places.state_dict()))
    sets = []
    for start in ({}, {"first": VALIDATION_FROM}, {"split": "test"}):
        drawn = build_pages(level, words, pages, **start)
        sets.append(Set(drawn, encode(model, drawn, level.device)))
    return World(level, words, task_names(level), pretrained, *sets)


@pytest.fixture(scope="module")
def world() -> World:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", lambda self: self)  # features as exact as the encoder makes them
        return world_of(LEVEL, 3)


def woken(arm: Arm) -> Arm:
    """The arm with blocks that do something."""
    torch.manual_seed(5)
    for name, parameter in arm.model.named_parameters():
        if "vision_remember" in name or "mlp_control" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return arm


def first_question(streams: Streams) -> Streams:
    """The first question alone, up to the first word of its answer."""
    answers = (streams.target >= 0).long()
    asks = (streams.branch == 0) & (answers.cumsum(1) - answers == 0)
    return replace(
        streams,
        tokens=streams.tokens.where(asks, torch.zeros_like(streams.tokens)),
        branch=streams.branch.where(asks, torch.full_like(streams.branch, -1)),
        place=streams.place.where(asks, torch.zeros_like(streams.place)),
        target=streams.target.where(asks, torch.full_like(streams.target, IGNORE)),
    )


@pytest.mark.parametrize("spec", ARMS, ids=lambda spec: spec.name)
@torch.no_grad()
def test_cached_features_give_what_the_model_computes_from_pixels(spec: ArmSpec, world: World) -> None:
    arm = woken(build_arm(spec, LEVEL.shape, len(world.words), world.pretrained, 0))
    index = torch.arange(len(world.test.pages))
    pages = replace(world.test.pages, streams=first_question(world.test.pages.streams))
    cached, _, _ = arm_logits(arm, Set(pages, world.test.features), index, "cpu", False)
    inputs, _ = prompts(world.test.pages, arm.tokens, index, 0, "cpu")
    own = arm.model(**inputs).logits[:, -1]
    torch.testing.assert_close(cached, own, rtol=1e-3, atol=1e-4)
    if arm.handle is not None and not spec.gate:  # a zero gate lets nothing through, whatever stands behind it
        with arm.handle.disabled():
            assert not torch.allclose(arm.model(**inputs).logits[:, -1], own, rtol=1e-3, atol=1e-3)


def test_arms_with_blocks_begin_as_what_they_are_compared_with(world: World) -> None:
    index = torch.arange(len(world.test.pages))

    def logits(spec: ArmSpec) -> torch.Tensor:
        arm = build_arm(spec, LEVEL.shape, len(world.words), world.pretrained, 0)
        with torch.no_grad():
            return arm_logits(arm, world.test, index, "cpu", False)[0]

    pooled = logits(ArmSpec("pooled"))
    for spec in ARMS:
        starts = spec.layers and spec.projector == "adaptive_avg_pool" and spec.ratio == 4
        identity = (
            spec.control or spec.gate or (spec.preset, spec.overrides.get("zero_init", True)) == ("default", True)
        )
        if starts and identity:
            torch.testing.assert_close(logits(spec), pooled, rtol=1e-5, atol=1e-5, msg=spec.name)
        elif starts:
            assert not torch.allclose(logits(spec), pooled, rtol=1e-3, atol=1e-3), spec.name


def test_the_vision_tower_and_nothing_else_stays_frozen(world: World) -> None:
    arm = build_arm(ArmSpec("vr", layers=(1, 4)), LEVEL.shape, len(world.words), world.pretrained, 0)
    frozen = {name.split(".")[1] for name, p in arm.model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_tower"}
    assert len(arm.trained()) == sum(p.requires_grad for p in arm.model.parameters())


def test_a_question_counts_when_every_word_of_its_answer_is_right(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = build_arm(ArmSpec("pooled"), LEVEL.shape, len(world.words), world.pretrained, 0)
    target = torch.full((2, 8), IGNORE)
    branch = torch.full((2, 8), -1)
    # page 0: two questions with two words each; page 1: one question with one word
    branch[0, :6], target[0, :6] = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([IGNORE, 7, 8, IGNORE, 9, 7])
    branch[1, :2], target[1, 1] = 0, 6
    streams = Streams(torch.zeros_like(target), branch, torch.zeros_like(target), target)
    said = torch.tensor([7, 8, 9, 8, 6])  # right and right, right and wrong, right

    def answers(*_: object) -> tuple[torch.Tensor, torch.Tensor, Streams]:
        return torch.nn.functional.one_hot(said, 10).float(), target[target >= 0], streams

    monkeypatch.setattr("benchmarks.proof.train.arm_logits", answers)
    pages = replace(world.test.pages, labels=world.test.pages.labels[:2], tasks=torch.tensor([0, 1]), streams=streams)
    assert evaluate(arm, Set(pages, world.test.features), LEVEL, world.tasks) == {"attribute": 0.5, "characters": 1.0}


def test_a_run_reports_the_test_pages_and_watches_the_validation_pages(world: World) -> None:
    arm, found = run(ArmSpec("vr", layers=(1, 4)), 0, world, [_Bar()] * LEVEL.arm.steps)  # type: ignore[list-item]
    assert found["test"] == evaluate(arm, world.test, LEVEL, world.tasks)
    assert found["curve"]["validation"][-1] == evaluate(arm, world.validation, LEVEL, world.tasks)
    said = {json.dumps(evaluate(arm, data, LEVEL, world.tasks)) for data in (world.train, world.validation, world.test)}
    assert len(said) > 1  # or the lines above could not tell them apart


def test_arms_see_equal_pages_at_their_own_rate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    rates: list[float] = []

    def pages_of(
        arm: Arm, data: Set, index: torch.Tensor, device: str, half: bool
    ) -> tuple[torch.Tensor, torch.Tensor, Streams]:
        if data is world.train:
            seen.append(index)
        return arm_logits(arm, data, index, device, half)

    def at_rate(trained: Any, recipe: Recipe, *rest: Any, **options: Any) -> list[float]:
        rates.append(recipe.lr)
        return optimise(trained, recipe, *rest, **options)

    monkeypatch.setattr("benchmarks.proof.train.arm_logits", pages_of)
    monkeypatch.setattr("benchmarks.proof.train.optimise", at_rate)
    steps = LEVEL.arm.steps
    for spec, seed in ((ArmSpec("pooled"), 0), (ArmSpec("another", layers=(1,), lr=0.125), 0), (ArmSpec("pooled"), 1)):
        run(spec, seed, world, [_Bar()] * steps)  # type: ignore[list-item]
    assert rates == [LEVEL.arm.lr, 0.125, LEVEL.arm.lr]
    one, other, new_seed = (torch.cat(seen[start : start + steps]) for start in range(0, 3 * steps, steps))
    assert torch.equal(one, other)
    assert not torch.equal(one, new_seed)


def test_levels_that_arms_read_are_kept() -> None:
    assert kept_levels(24) == (12, 13, 16, 18, 22, 23, 24)


def test_the_gpu_level_trains_a_step_on_the_cpu() -> None:
    narrow = replace(GPU.shape, vision_width=32, text_width=32, heads=4)
    one = replace(GPU.arm, steps=1, batch=2)
    level = replace(GPU, shape=narrow, arm=one, device="cpu", half=False, tasks=("characters",), prefill_repeats=1)
    world = world_of(level, 8)  # as many pages as the timing takes
    spec = next(arm for arm in SUITES["table4c"] if arm.layers == (1, 4, 7))
    arm, found = run(spec, 0, world, [_Bar()])  # type: ignore[list-item]
    assert (found["tokens"], arm.grid) == (144, (24, 24))
    assert len(look_inside(arm, world)["density"]) == 12


class _Bar:
    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        """What the optimiser says to its bar."""


def test_rivals_start_from_the_arm_without_compression_and_leave_it_as_it_was(world: World) -> None:
    arm = build_arm(ArmSpec("none", projector=None, ratio=1), LEVEL.shape, len(world.words), world.pretrained, 0)
    found = pruned(arm, world)
    assert set(found) == {"none", *(rival.name for rival in RIVALS)}
    assert found["none"]["test"] == asked_alone(arm, world)
    cells = LEVEL.shape.grid**2
    for rival in RIVALS:
        assert set(found[rival.name]["test"]) == set(world.tasks)
        assert 0 < found[rival.name]["tokens"] <= cells  # SparseVLM drops nothing that its rank says is needed
    # two of eight layers see everything, the others a quarter
    assert found["FastV 1/4"]["tokens"] == pytest.approx(cells * (2 + 6 / 4) / 8)
    assert found["uniform 1/9"]["tokens"] == pytest.approx(cells / 9)


def test_a_window_in_the_mask_is_a_sliding_layer(world: World) -> None:
    arm = build_arm(ArmSpec("none", projector=None, ratio=1), LEVEL.shape, len(world.words), world.pretrained, 0)
    inputs, _ = prompts(world.test.pages, arm.tokens, torch.arange(len(world.test.pages)), 0, "cpu")
    with torch.no_grad():
        own = arm.model(**inputs).logits[:, -1]
        with windows_as_masks(arm.model.model.language_model):
            masked = arm.model(**inputs).logits[:, -1]
    torch.testing.assert_close(masked, own)
    assert arm.model.model.language_model.config.layer_types[0] == "sliding_attention"


def test_questions_asked_alone_are_those_of_the_packed_pages(world: World) -> None:
    arm = build_arm(ArmSpec("none", projector=None, ratio=1), LEVEL.shape, len(world.words), world.pretrained, 0)
    packed, truth, streams = arm_logits(arm, world.test, torch.arange(len(world.test.pages)), "cpu", False)
    page, position = (streams.target >= 0).nonzero(as_tuple=True)
    second = streams.branch[page, position] == 1
    inputs, alone_truth = prompts(world.test.pages, arm.tokens, torch.arange(len(world.test.pages)), 1, "cpu")
    with torch.no_grad():
        alone = arm.model(**inputs).logits[:, -1]
    assert alone_truth.tolist() == truth[second].tolist()
    torch.testing.assert_close(packed[second], alone, rtol=1e-3, atol=1e-4)


def test_every_arm_and_pruner_is_timed_against_the_same_reference(world: World) -> None:
    found = measure(LEVEL, world)
    twins = distinct([absorbed(arm) for arm in [*SUITES["search"], *SEARCHED] if arm.layers])
    assert len([name for name in found if "prefill" in found[name]]) == len(ARMS) + len(twins)
    assert {rival.name for rival in RIVALS} <= set(found)
    assert found["pooled"] == {"prefill": [1, 1, 1], "forward": [1, 1, 1]}
    assert all(low <= median <= high for own in found.values() for low, median, high in own.values())
