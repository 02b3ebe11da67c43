"""The configuration: plain frozen data, checked when made."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from typing import Any

import pytest

from vision_remember import INTERACTIONS, PRESETS, VisionRemember, VisionRememberConfig
from vision_remember.interactions import interaction_options

# One value per field that is neither its default nor a tuple of the same JSON form by chance.
OTHER_VALUES: dict[str, Any] = {
    "layers": (2, 5, 7),
    "levels": (0, 3, -1),
    "interaction": "sela",
    "attn_dim": "features",
    "num_heads": 8,
    "num_points": 3,
    "window": 2,
    "position": "learned",
    "cells": (3, 2),
    "fusion": "tokens",
    "feature_norm": "joint",
    "query_layers": 2,
    "output_layers": 2,
    "inner_projections": True,
    "zero_init": False,
    "absorb": "auto",
    "token_mixer": "self",
    "saliency": None,
    "saliency_level": -2,
    "saliency_variant": "relative",
    "saliency_center": "zscore",
    "saliency_temperature": 0.5,
    "token_grid": (12, 14),
}


def test_every_field_is_tried_below() -> None:
    assert set(OTHER_VALUES) == {field.name for field in dataclasses.fields(VisionRememberConfig)}


@pytest.mark.parametrize(
    "config", [VisionRememberConfig(), VisionRememberConfig(**OTHER_VALUES)], ids=["default", "other"]
)
def test_json_brings_back_an_equal_config(config: VisionRememberConfig) -> None:
    text = config.to_json()
    assert VisionRememberConfig.from_json(text) == config
    assert VisionRememberConfig.from_json(json.dumps(json.loads(text))) == config
    assert VisionRememberConfig.from_dict(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items())
def test_replace_changes_one_field_of_a_copy(name: str, value: Any) -> None:
    config = VisionRememberConfig()
    changed = config.replace(**{name: value})
    assert changed.to_dict() == {**config.to_dict(), name: value}
    assert config == VisionRememberConfig()


def test_it_is_frozen_and_hashable() -> None:
    config = VisionRememberConfig(layers=[1, 4], cells=[2, 2])  # type: ignore[arg-type]
    assert hash(config) == hash(VisionRememberConfig(cells=(2, 2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 2  # type: ignore[misc]


def test_fields_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        VisionRememberConfig((1, 4))  # type: ignore[call-arg]


def fields_of_blocks() -> set[str]:
    """Those that some interaction has an option for."""
    return {option for name in INTERACTIONS for option in interaction_options(name)} & set(OTHER_VALUES)


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_block_of_every_interaction(name: str, interaction: str) -> None:
    lacking = set(PRESETS[name]) & fields_of_blocks() - set(interaction_options(interaction))
    # the paper's two query layers, say, are of a query that not every interaction has
    choices = {"interaction": interaction, **{field: getattr(VisionRememberConfig(), field) for field in lacking}}
    config = VisionRememberConfig.from_preset(name, **choices)
    assert config == VisionRememberConfig(**{**PRESETS[name], **choices})
    block = VisionRemember.from_config(config, 16, 24, num_levels=3)
    assert type(block.interaction) is INTERACTIONS[interaction]


def test_the_default_preset_is_the_default_config() -> None:
    assert VisionRememberConfig.from_preset() == VisionRememberConfig()


def test_an_override_wins_over_the_preset() -> None:
    assert VisionRememberConfig.from_preset("paper").zero_init is False
    assert VisionRememberConfig.from_preset("paper", zero_init=True).zero_init is True


@pytest.mark.parametrize("name", INTERACTIONS)
def test_every_field_that_an_interaction_has_reaches_it(name: str) -> None:
    """The levels are the tap's to say, the back-end the machine's; all else must not be forgotten on the way."""
    known = interaction_options(name)
    config = VisionRememberConfig(**{k: v for k, v in OTHER_VALUES.items() if k in known}, interaction=name)
    options = config.interaction_options(known)
    elsewhere = ("num_levels", "level_dims", "backend")
    assert options == {option: OTHER_VALUES[option] for option in known if option not in elsewhere}
    assert None not in VisionRememberConfig(interaction=name).interaction_options(known).values()


@pytest.mark.parametrize("name", INTERACTIONS)
def test_a_field_that_an_interaction_lacks_is_an_error_once_it_is_set(name: str) -> None:
    for field in fields_of_blocks() - set(interaction_options(name)):
        config = VisionRememberConfig(**{field: OTHER_VALUES[field]}, interaction=name)
        with pytest.raises(ValueError, match=f"{field}=.*interaction '{name}' has no such option"):
            VisionRemember.from_config(config, 16, 24)


@pytest.mark.parametrize(
    "make",
    [
        VisionRememberConfig().replace,
        VisionRememberConfig.from_preset,
        lambda **data: VisionRememberConfig.from_dict(data),
        lambda **data: VisionRememberConfig.from_json(json.dumps(data)),
    ],
    ids=["replace", "from_preset", "from_dict", "from_json"],
)
def test_an_unknown_field_is_an_error_with_a_suggestion(make: Any) -> None:
    with pytest.raises(ValueError, match="no field 'zero_int': did you mean 'zero_init'"):
        make(zero_int=True)


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_json_without_fields_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(repr(json.loads(text)))}: expected the fields of"):
        VisionRememberConfig.from_json(text)


def test_an_unknown_preset_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="unknown preset 'papr': did you mean 'paper'"):
        VisionRememberConfig.from_preset("papr")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", (), "expected at least one"),
        ("layers", (1, "4"), "whole number"),
        ("layers", (1, 4.0), "whole number"),
        ("layers", (1, 4, 1), "repeated"),
        ("layers", (1, -4), "none negative"),
        ("levels", (), "expected at least one"),
        ("levels", (1.5,), "whole number"),
        ("levels", (3, 3), "repeated"),
        ("cells", (2,), "positive integers"),
        ("cells", (0, 2), "positive integers"),
        ("token_grid", (12, -12), "positive integers"),
        ("token_grid", [12, 12.5], "positive integers"),
        ("saliency", "clss", "'cls'"),
        ("saliency_center", "median", "'zscore'"),
        ("saliency_temperature", 0, "positive number"),
        ("saliency_temperature", -1.0, "positive number"),
        ("saliency_temperature", float("nan"), "positive number"),
        ("saliency_temperature", float("inf"), "positive number"),
    ],
)
def test_values_that_cannot_be_meant_are_errors_that_name_the_field(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=.*{message}"):
        VisionRememberConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 3),
        ("levels", 3),
        ("token_grid", 12),
        ("window", 0),
        ("num_heads", 0),
        ("attn_dim", "feature"),
        ("position", "rotary"),
        ("feature_norm", "layer"),
        ("token_mixer", "text"),
        ("query_layers", 3),
        ("saliency_level", "last"),
        ("saliency_temperature", "warm"),
    ],
)
def test_every_field_is_checked_when_the_config_is_made(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        VisionRememberConfig(**{field: value})
