"""Every host of the image-text-to-text mapping: those that Vision Remember attaches to, and why not others."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers as hf
from packaging.version import Version
from torch import Tensor

from tests.fingerprint import structure
from tests.zoo import CLASSES, FAILS_ALONE, NEEDS_TIMM, REFUSED, REFUSED_WHEN_TRIED, SUPPORTED, build_host, outline
from tests.zoo_checks import CHECKS, Subject, subject
from vision_remember import MultiLevelTap, attach_vision_remember
from vision_remember.adapters.tokens import image_tokens
from vision_remember.encoder import find_module

SLOW = {
    *("deepseek_vl_hybrid", "gemma4", "got_ocr2", "minicpm_ocr", "minicpmv4_6", "pp_chart2table", "qwen3_5_moe"),
    *("cosmos3_omni", "exaone4_5", "glm46v", "glm4v_moe", "glm_ocr", "glmga", "hyperclovax_vision_v2", "lighton_ocr"),
    *("muse_spark", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "qwen3_vl_moe", "shieldgemma2"),
    *("deepseek_ocr2", "unlimited_ocr"),
}
"""Hosts of several seconds, and near copies of others."""


def marked(model_types: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in model_types]


KINDS = {
    "raster, CLS at the end": "llama4",
    "raster, CLS in front": "internvl",
    "raster, a token per cell": "deepseek_vl",
    "packed": "mistral3",
    "packed, prefix tokens": "nemotron_h_omni",
    "blocks": "qwen3_vl",
    "windows": "qwen2_5_vl",
    "padded, sizes": "lfm2_vl",
    "padded, places": "gemma4",
}


@functools.lru_cache(maxsize=1)
def host_of(model_type: str) -> Subject:
    if model_type in FAILS_ALONE and Version(hf.__version__) >= Version(FAILS_ALONE[model_type]):
        try:
            with torch.no_grad():
                build_host(model_type)(input_ids=torch.tensor([[3, 4, 5]]))
        except AttributeError as error:
            pytest.skip(f"{model_type} alone fails in transformers {hf.__version__}: {error}")
    return subject(model_type)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("model_type", marked(SUPPORTED))
def test_a_host(model_type: str, check: str) -> None:
    CHECKS[check](host_of(model_type))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_made_of_the_cells_that_lie_under_it(kind: str) -> None:
    """By the gradient of single tokens with respect to the last block's output, at the cells of the tap's raster."""
    host = host_of(KINDS[kind])
    parts, base = host.parts, host.parts.base
    geometry, blocks = parts.spec.geometry, find_module(parts.encoder, parts.encoder_spec.layers, "blocks")
    assert geometry is not None
    assert geometry.cells is not None
    images = {n: v for n, v in host.inputs.items() if n in inspect.signature(base.get_image_features).parameters}
    last: list[Tensor] = []
    hook = list(blocks.children())[-1].register_forward_hook(
        lambda _, args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    with MultiLevelTap(parts.encoder, (-1,), saliency=None, spec=parts.encoder_spec).capture() as captured:
        tokens = torch.cat([image.flatten(0, -2) for image in image_tokens(base.get_image_features(**images))])
    hook.remove()
    positions, start = last[0].detach().flatten(0, -2), 0
    tiles = {number: (group, row) for group in captured.groups for row, number in enumerate(group.numbers)}
    assert len(tiles) == 2
    for number in range(len(tiles)):
        group, row = tiles[number]
        (height, width), (a, b) = group.grid, geometry.cells
        h, w = height // a, width // b
        cells = group.levels[0][row].detach().view(h, a, w, b, -1)
        for token in (0, w - 1, w, h * w - 1):
            weights = torch.randn(tokens.shape[-1], generator=torch.Generator().manual_seed(token))
            (gradient,) = torch.autograd.grad(tokens[start + token] @ weights, last[0], retain_graph=True)
            used = positions[gradient.flatten(0, -2).abs().amax(-1) > 0]
            expected = cells[token // w, :, token % w].flatten(0, 1)
            assert {tuple(cell) for cell in used.tolist()} == {tuple(cell) for cell in expected.tolist()}
        start += h * w
    assert start == len(tokens)


@pytest.mark.skipif(Version(hf.__version__) < Version("5.23"), reason="older versions map fewer classes")
def test_the_tables_hold_every_class_of_the_mapping_once() -> None:
    assert sorted([*SUPPORTED, *REFUSED, *NEEDS_TIMM]) == sorted(CLASSES)


@pytest.mark.parametrize("model_type", marked(name for name in REFUSED if name in CLASSES))
def test_a_host_that_does_not_fit_is_refused_with_the_reason_and_left_as_it_was(model_type: str) -> None:
    model = (build_host if model_type in REFUSED_WHEN_TRIED else outline)(model_type)
    before = structure(model)
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        attach_vision_remember(model, layers=[0])
    left = structure(model)
    # transformers itself installs hooks in a first forward pass
    assert all(left[what] == before[what] for what in ("modules", "trainable"))
    assert not any("vision_remember" in name for _, names in left["attributes"] for name in names)
