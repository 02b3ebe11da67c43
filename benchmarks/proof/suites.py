"""The paper's tables as sets of arms, and what the paper left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from .arms import ArmSpec
from .levels import Level

PAPER_LAYERS = (1, 4)
PROJECTOR_NAMES = {
    "adaptive_avg_pool": "average pool",
    "pixel_shuffle": "PixelShuffle",
    "deformable_pool": "deformable",
    "ldpv2": "LDPv2",
    "token_packer": "TokenPacker",
}
RATIOS = (4, 9, 16)
SEARCHED_RATIOS = (4, 9)
TUNING_SEED = 100
"""Seed of every run that a choice is made from; reported seeds are below it."""
TUNING_FACTORS = (0.5, 1, 2)
"""Learning rates that an interaction is tried with, relative to the level's."""
INTERACTION_NAMES = {"global": "global attention", "deformable": "deformable attention", "sela": "SELA"}

PAPER_FACTOR: dict[str, Any] = {"saliency_variant": "logit"}
BOOST: dict[str, Any] = {"saliency_variant": "boost"}
SALIENCIES: dict[str, dict[str, Any]] = {
    "sigmoid": PAPER_FACTOR,
    "1 + sigmoid": BOOST,
    "no saliency": {**PAPER_FACTOR, "saliency": None},
}
"""The paper's, a factor in (0, 1), what became the default, and none. Arms of which no table says anything else have
the paper's."""
DEFAULT_SALIENCY = "1 + sigmoid"

POOLED = ArmSpec("pooled")
REMEMBER = ArmSpec("pooled + VR", layers=PAPER_LAYERS, overrides=PAPER_FACTOR)


def changed(name: str, **overrides: Any) -> ArmSpec:
    """Vision Remember with the paper's saliency and something else than the default."""
    return replace(REMEMBER, name=name, overrides={**PAPER_FACTOR, **overrides})


def pooled(ratio: int) -> ArmSpec:
    """Average pooling alone."""
    return replace(POOLED, name=f"pooled 1/{ratio}", ratio=ratio)


def remember(ratio: int) -> ArmSpec:
    """Average pooling with Vision Remember."""
    return replace(REMEMBER, name=f"pooled 1/{ratio} + VR", ratio=ratio)


def interaction_arm(interaction: str, saliency: str = DEFAULT_SALIENCY) -> ArmSpec:
    """Vision Remember with an interaction and one of `SALIENCIES`, everything else as in the default preset."""
    named = {} if interaction == "sela" else {"interaction": interaction}
    return changed(f"{INTERACTION_NAMES[interaction]}, {saliency}", **SALIENCIES[saliency], **named)


def rate_arms(arm: ArmSpec, level: Level) -> list[ArmSpec]:
    """The arm at each learning rate. The level's own goes unsaid, so that the arm is the same as in other tables."""
    rates = [None if factor == 1 else factor * level.arm.lr for factor in TUNING_FACTORS]
    return [replace(arm, lr=rate) for rate in rates]


def _table2() -> list[ArmSpec]:
    arms = []
    for projector, name in PROJECTOR_NAMES.items():
        arms.append(ArmSpec(name, projector=projector))
        arms.append(replace(REMEMBER, name=f"{name} + VR", projector=projector))
    return arms


def _table4a() -> list[ArmSpec]:
    deformable = {"interaction": "deformable", "saliency": None}
    return [
        replace(POOLED, name="baseline (average pool)"),
        changed("+ resample (deformable, last level)", **deformable, levels=(-1,)),
        changed("+ multi-level", **deformable),
        replace(REMEMBER, name="+ SELA"),
        changed("saliency alone", position="none"),
        changed("window position alone", saliency=None),
        replace(changed("zero gate", zero_init=False), gate=True),
        changed("ordinary start (no zero output)", zero_init=False),
    ]


def _table4c() -> list[ArmSpec]:
    layers = ((1,), (1, 4), (1, 4, 7), (4,), (7,))
    return [replace(REMEMBER, name=", ".join(map(str, chosen)), layers=chosen) for chosen in layers]


def _table5a() -> list[ArmSpec]:
    none = ArmSpec("no compression", projector=None, ratio=1)
    return [none, *(arm for ratio in RATIOS for arm in (pooled(ratio), remember(ratio)))]


def _controls() -> list[ArmSpec]:
    return [
        POOLED,
        replace(REMEMBER, name="pooled + MLP of equal parameters", control="parameters"),
        replace(REMEMBER, name="pooled + MLP of equal compute", control="compute"),
        REMEMBER,
    ]


def _without_start() -> list[ArmSpec]:
    """Arms whose heads tell no cell apart at first, besides those of table 4a."""
    return [
        changed("neither saliency nor position", saliency=None, position="none"),
        changed("position learned from near zero", position="learned"),
        replace(REMEMBER, name="the paper as printed", preset="paper"),
    ]


def _causes() -> list[ArmSpec]:
    """Is it the map, or its mean? Is it SELA, or its start?"""
    # A map that says nothing: for every cell the middle of its range, which the average cell has in any case.
    flat = {"saliency_temperature": 1e6}
    bare = {"saliency": None}
    return [
        REMEMBER,
        changed("pooled + VR, 0.5 for every cell", **flat),
        changed("pooled + VR, 1 + sigmoid", **BOOST),
        changed("pooled + VR, 1.5 for every cell", **flat, **BOOST),
        changed("pooled + VR, no saliency", **bare),
        *_without_start(),
        changed("deformable, no saliency", interaction="deformable", **bare),
        changed(
            "deformable, no saliency, each head on a cell", interaction="deformable", num_heads=4, num_points=1, **bare
        ),
    ]


def _rivals() -> list[ArmSpec]:
    deepstack = [
        changed(f"DeepStack, {name}", **saliency, interaction="deepstack") for name, saliency in SALIENCIES.items()
    ]
    return [*_table5a()[:3], *deepstack]


_NINE_HEADS: dict[str, Any] = {"attn_dim": 144, "num_heads": 9}
_TWO_PER_CELL: dict[str, Any] = {"attn_dim": 288, "num_heads": 18}
BOOSTED = "saliency that takes nothing away"


def _tried(ratio: int, name: str, layers: tuple[int, ...] = PAPER_LAYERS, **overrides: Any) -> ArmSpec:
    return replace(remember(ratio), name=f"1/{ratio}: {name}", layers=layers, overrides={**PAPER_FACTOR, **overrides})


def boosted_arms(ratio: int) -> list[ArmSpec]:
    """What became the default, with the paper's places and with one: run at every ratio, whatever is chosen."""
    return [_tried(ratio, BOOSTED, **BOOST), _tried(ratio, f"{BOOSTED}, before 1 alone", (1,), **BOOST)]


def searched_arms(ratio: int) -> list[ArmSpec]:
    """What is tried for a better default at a ratio: SELA as in the tables, changes, other places of the blocks."""
    tried = partial(_tried, ratio)
    both, single = boosted_arms(ratio)
    if ratio == 4:
        return [
            tried("as in the tables"),
            tried("no saliency", saliency=None),
            both,
            tried("wider, a head more per cell", attn_dim=256, num_heads=16),
            tried("two query layers", query_layers=2),
            tried("two output layers", output_layers=2),
            tried("no saliency, two query and output layers", saliency=None, query_layers=2, output_layers=2),
            tried("no saliency, wider", saliency=None, attn_dim=256, num_heads=16),
            tried("blocks before 1, 2", (1, 2)),
            single,
            *_other_keys(tried),
        ]
    return [
        tried("as in the tables"),
        both,
        single,
        tried(f"nine heads as wide, {BOOSTED}", **_NINE_HEADS, **BOOST),
        tried(f"nine heads as wide, {BOOSTED}, before 1 alone", (1,), **_NINE_HEADS, **BOOST),
        tried(f"two heads per cell, {BOOSTED}", **_TWO_PER_CELL, **BOOST),
        tried(f"two heads per cell, {BOOSTED}, before 1 alone", (1,), **_TWO_PER_CELL, **BOOST),
        *_other_keys(tried),
    ]


def _other_keys(tried: Callable[..., ArmSpec]) -> list[ArmSpec]:
    """Attention to each level of a cell by itself, and to the cells of four tokens."""
    return [
        tried(f"levels apart, {BOOSTED}", fusion="tokens", **BOOST),
        tried(f"regions of four tokens, {BOOSTED}", window=2, **BOOST),
    ]


def _patience() -> list[ArmSpec]:
    """Arms that stay behind, and what they stay behind of."""
    late = [arm for arm in _table4a() if arm.name in ("saliency alone", "zero gate")]
    none = _table5a()[0]
    return [
        none,
        remember(RATIOS[0]),
        *late,
        *_without_start(),
        *(arm for ratio in RATIOS for arm in (pooled(ratio), *boosted_arms(ratio))),
    ]


PAPER_SUITES = ("table2", "table4a", "table4b", "table4c", "table5a", "controls")
"""The paper's tables, and the controls that they lack."""
INTERACTION_SALIENCIES = [interaction_arm(name, saliency) for name in INTERACTION_NAMES for saliency in SALIENCIES]
"""What the search tries besides: which saliency does best with which interaction."""
SEARCHED = [arm for ratio in SEARCHED_RATIOS for arm in searched_arms(ratio)]
SUITES = {
    "table2": _table2(),
    "table4a": _table4a(),
    "table4b": [interaction_arm(name) for name in INTERACTION_NAMES],
    "table4c": _table4c(),
    "table5a": _table5a(),
    "controls": _controls(),
    "causes": _causes(),
    "rivals": _rivals(),
    "patience": _patience(),
    "search": [*_table5a(), *(arm for ratio in RATIOS for arm in boosted_arms(ratio))],
}
"""Arms by suite. Of table 4b each interaction is run with the rate that did best on the validation pages; to those of
"search" come the arms that did best there."""


def distinct(arms: Sequence[ArmSpec]) -> list[ArmSpec]:
    """The arms without those that another name already runs."""
    found: list[ArmSpec] = []
    for arm in arms:
        if arm.recipe() not in [other.recipe() for other in found]:
            found.append(arm)
    return found
