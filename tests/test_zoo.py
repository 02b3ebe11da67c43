"""Every host of the image-text-to-text mapping: those that Vision Remember attaches to, and why not others."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest

from tests.fingerprint import structure
from tests.zoo import CLASSES, NEEDS_TIMM, REFUSED, REFUSED_WHEN_TRIED, SUPPORTED, build_host, outline
from tests.zoo_checks import CHECKS, Subject, subject
from vision_remember import attach_vision_remember

SLOW = {
    *("deepseek_vl_hybrid", "gemma4", "got_ocr2", "minicpm_ocr", "minicpmv4_6", "pp_chart2table", "qwen3_5_moe"),
    *("cosmos3_omni", "exaone4_5", "glm46v", "glm4v_moe", "glm_ocr", "glmga", "hyperclovax_vision_v2", "lighton_ocr"),
    *("muse_spark", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "qwen3_vl_moe", "shieldgemma2"),
    *("deepseek_ocr2", "unlimited_ocr"),
}
"""Hosts of several seconds, and near copies of others."""


def marked(model_types: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in model_types]


@functools.lru_cache(maxsize=1)
def host_of(model_type: str) -> Subject:
    return subject(model_type)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("model_type", marked(SUPPORTED))
def test_a_host(model_type: str, check: str) -> None:
    CHECKS[check](host_of(model_type))


def test_the_tables_hold_every_class_of_the_mapping_once() -> None:
    assert sorted([*SUPPORTED, *REFUSED, *NEEDS_TIMM]) == sorted(CLASSES)


@pytest.mark.parametrize("model_type", marked(REFUSED))
def test_a_host_that_does_not_fit_is_refused_with_the_reason_and_left_as_it_was(model_type: str) -> None:
    model = (build_host if model_type in REFUSED_WHEN_TRIED else outline)(model_type)
    before = structure(model)
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        attach_vision_remember(model, layers=[0])
    left = structure(model)
    # transformers itself installs hooks in a first forward pass
    assert all(left[what] == before[what] for what in ("modules", "trainable"))
    assert not any("vision_remember" in name for _, names in left["attributes"] for name in names)
