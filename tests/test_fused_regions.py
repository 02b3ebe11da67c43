"""Regions on a CPU without gradients: the fused attention, several regions of one image at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.launches import counted, fake
from tests.reference import masked_global_attention
from tests.test_local_attention import tensors
from tests.test_one_query import explicit
from vision_remember import local_attention
from vision_remember.grid import Grid
from vision_remember.interactions import SELA
from vision_remember.ops import windowed
from vision_remember.ops.windowed import attend_regions


@pytest.mark.parametrize("bias", [None, 3, 4])
@pytest.mark.parametrize("value_dim", [3, 5])
@pytest.mark.parametrize(
    ("grids", "window"),
    [
        (((2, 4), (4, 8)), 1),  # four regions of four cells together
        (((4, 4), (4, 8)), 1),  # eight of two
        (((4, 4), (4, 4)), 1),  # sixteen of one
        (((2, 4), (4, 16)), 1),  # two of eight
        (((2, 3), (4, 6)), 1),  # six regions, which four do not divide
        (((2, 2), (8, 10)), 1),
        (((2, 4), (4, 8)), 2),
        (((3, 4), (7, 9)), 1),
        (((3, 4), (7, 9)), 2),
    ],
    ids=str,
)
def test_without_gradients_every_form_is_masked_global_attention(
    grids: tuple[Grid, Grid], window: int, value_dim: int, bias: int | None
) -> None:
    if bias == 3 and grids[1][0] % grids[0][0]:
        bias = 4
    inputs = tensors(*grids, window, saliency=True, bias=bias)
    inputs["value"] = inputs["value"][..., :value_dim]
    rest: dict[str, Any] = {"query_grid": grids[0], "key_grid": grids[1], "window": window}
    expected = masked_global_attention(**inputs, **rest)
    with torch.no_grad():
        torch.testing.assert_close(local_attention(**inputs, **rest), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("side", "at_once"), [(4, 4), (2, 4), (3, 1)])
def test_what_is_not_finite_stays_in_its_image(side: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions are computed together, but not those of two images, nine each, though four divides those of all."""
    queries: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, *rest: Any) -> Tensor:
        queries.append(query.shape[2])
        return original(query, *rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    query = torch.randn(4, 2, side**2, 8)
    key, bias = torch.randn(4, 2, 4 * side**2, 8), torch.randn(2, 1, 4)
    rest: dict[str, Any] = {"query_grid": (side, side), "key_grid": (2 * side, 2 * side), "bias": bias}
    with torch.no_grad():
        expected = local_attention(query, key, key, **rest)
        key[1] = math.nan
        found = local_attention(query, key, key, **rest)
    assert queries == [at_once] * 2
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize(("queries", "cells"), [(1, 4), (1, 16), (4, 16)])
def test_the_mask_of_the_fused_attention_is_never_one_that_wants_a_gradient(
    queries: int, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would leave the fused kernel."""
    masks: list[Tensor] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        masks.append(mask)
        return original(query, key, value, mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    query, key = torch.randn(3, 2, queries, 8), torch.randn(3, 2, cells, 8)
    bias = torch.randn(2, queries, cells, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(attend_regions(query, key, key, bias), explicit(query, key, key, bias))
    assert [mask.requires_grad for mask in masks] == [False]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("regions", "dtype", "learning", "fused"),
    [
        (65535, torch.float32, True, True),
        (65536, torch.float32, False, False),
        (0, torch.float16, False, False),
        (16384, torch.float16, True, True),
        (16385, torch.float16, True, False),
        (16385, torch.float16, False, True),
        (16385, torch.float32, True, True),
    ],
)
def test_a_gpu_is_asked_for_no_more_than_its_fused_kernels_count(
    regions: int, dtype: torch.dtype, learning: bool, fused: bool, bias: bool
) -> None:
    with fake("cuda") as empty, counted() as launches, torch.set_grad_enabled(learning):
        query, key = (empty(regions, 16, n, 64, dtype=dtype) for n in (1, 4))
        read = attend_regions(query, key, key, empty(16, 1, 4, dtype=dtype) if bias else None)
    assert read.shape == query.shape
    fused = fused or (bias and regions == 16385)  # another kernel's backward pass, which counts otherwise
    assert launches.names.count("fused attention") == fused
    assert ("aten.bmm.default" in launches.names) != fused


@pytest.mark.parametrize("bias", [False, True])
def test_where_fused_kernels_do_not_reach_it_is_the_same(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU would do it: the bound is that of a device, the products are those of any."""
    monkeypatch.setattr(windowed, "_fused_takes", lambda *_: False)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    query, key = torch.randn(5, 2, 3, 8), torch.randn(5, 2, 4, 8)
    given = torch.randn(2, 3, 4) if bias else torch.zeros(2, 3, 4)
    found = attend_regions(query, key, key, given if bias else None)
    torch.testing.assert_close(found, explicit(query, key, key, given))


@pytest.mark.parametrize("cells", [4, 16])
def test_autocast_narrows_no_sum(cells: int) -> None:
    query, key, bias = torch.randn(3, 2, 1, 8), torch.randn(3, 2, cells, 8), torch.randn(2, 1, cells)
    for learning in (False, True):
        with torch.set_grad_enabled(learning), torch.autocast("cpu", torch.bfloat16):
            found = attend_regions(query, key, key.clone().requires_grad_(learning), bias)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, explicit(query, key, key, bias))


def test_a_module_keeps_images_apart_too() -> None:
    module = SELA(16, 8, num_heads=4)
    tokens, features = torch.randn(4, 9, 16), torch.randn(4, 36, 8)
    torch.nn.init.normal_(module.vr_out.weight)
    features[1] = math.nan
    with torch.inference_mode():
        update = module(tokens, features, token_grid=(3, 3), feature_grid=(6, 6))
    assert update[1].isnan().all()
    assert update[[0, 2, 3]].isfinite().all()
