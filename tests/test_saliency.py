"""Saliency maps from one query row: equation 3 and its other readings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vision_remember import cls_saliency
from vision_remember.saliency import SALIENCY_VARIANTS

BATCH, HEADS, DIM, PATCHES = 2, 3, 8, 20

every_variant = pytest.mark.parametrize("variant", SALIENCY_VARIANTS)


def row(*, heads: int = HEADS, scale: float = 1.5, patches: int = PATCHES) -> tuple[Tensor, Tensor]:
    """A query and keys."""
    generator = torch.Generator().manual_seed(0)
    query = scale * torch.randn(BATCH, heads, DIM, generator=generator, dtype=torch.float64)
    return query, torch.randn(BATCH, heads, patches, DIM, generator=generator, dtype=torch.float64)


def from_logits(logits: Tensor, **options: Any) -> Tensor:
    """The map of given (B, heads, N) logits: a query of ones with keys that hold them."""
    keys = logits[..., None].expand(*logits.shape, DIM) / math.sqrt(DIM)
    return cls_saliency(torch.ones(*logits.shape[:2], DIM, dtype=logits.dtype), keys, **options)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(logits: list[list[float]], variant: str) -> list[float]:
    """One image; ``logits`` by head and patch."""
    heads, patches = len(logits), len(logits[0])
    softmax = [[math.exp(l) / sum(map(math.exp, head)) for l in head] for head in logits]  # noqa: E741
    columns = list(zip(*logits, strict=True))
    shares = list(zip(*softmax, strict=True))
    return {
        "logit": [sigmoid(sum(c) / heads) for c in columns],
        "boost": [1 + sigmoid(sum(c) / heads) for c in columns],
        "head_sigmoid": [sum(map(sigmoid, c)) / heads for c in columns],
        "softmax": [sigmoid(sum(c) / heads) for c in shares],
        "softmax_sum": [sigmoid(sum(c)) for c in shares],
        "relative": [1 - 1 / (1 + patches * sum(c) / heads) for c in shares],
    }[variant]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@every_variant
def test_maps_are_those_computed_by_hand(variant: str, temperature: float) -> None:
    query, keys = row()
    saliency = cls_saliency(query, keys, variant=variant, temperature=temperature)
    scale = temperature * math.sqrt(DIM)
    for image in range(BATCH):
        dots = [[float(query[image, h] @ keys[image, h, n]) / scale for n in range(PATCHES)] for h in range(HEADS)]
        expected = torch.tensor(by_hand(dots, variant), dtype=torch.float64)
        torch.testing.assert_close(saliency[image], expected, rtol=0, atol=1e-12)


def test_by_default_it_is_the_sigmoid_of_the_head_mean_logit() -> None:
    query, keys = row()
    logits = torch.einsum("bhd,bhnd->bhn", query, keys) / math.sqrt(DIM)
    torch.testing.assert_close(cls_saliency(query, keys), logits.mean(1).sigmoid(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("center", ["none", "mean", "zscore"])
@every_variant
def test_every_variant_ranks_the_patches_of_one_head_as_its_logits_do(variant: str, center: Any) -> None:
    query, keys = row(heads=1)
    logits = torch.einsum("bhd,bhnd->bn", query, keys)
    saliency = cls_saliency(query, keys, variant=variant, center=center)
    assert saliency.shape == (BATCH, PATCHES)
    assert torch.equal(saliency.argsort(-1), logits.argsort(-1))
    least = 1 if variant == "boost" else 0
    assert ((saliency > least) & (saliency < least + 1)).all()


@every_variant
def test_a_high_temperature_makes_the_map_flat(variant: str) -> None:
    query, keys = row()
    spread = [cls_saliency(query, keys, variant=variant, temperature=t).std(-1) for t in (1.0, 10.0, 1e6)]
    assert (spread[0] > spread[1]).all()
    assert (spread[1] > spread[2]).all()
    assert (spread[2] < 1e-5).all()


@pytest.mark.parametrize("center", ["mean", "zscore"])
@every_variant
def test_centred_maps_do_not_see_an_offset_of_the_logits(variant: str, center: Any) -> None:
    logits = torch.randn(BATCH, HEADS, PATCHES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain, shifted = (from_logits(x, variant=variant, center=center) for x in (logits, logits + 5))
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-9)


def test_an_offset_saturates_the_map_that_is_not_centred() -> None:
    logits = torch.randn(BATCH, HEADS, PATCHES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert from_logits(logits + 20).min() > 0.999
    centred = from_logits(logits + 20, center="mean")
    torch.testing.assert_close(centred.logit().mean(-1), torch.zeros(BATCH, dtype=torch.float64), rtol=0, atol=1e-9)


def test_centring_keeps_the_differences_between_heads() -> None:
    logits = torch.zeros(1, 2, PATCHES, dtype=torch.float64)
    logits[:, 1, :] = 4
    logits[:, 1, 0] = 4 + PATCHES
    offset = 2.5  # the mean of all
    expected = torch.full((1, PATCHES), (sigmoid(-offset) + sigmoid(4 - offset)) / 2, dtype=torch.float64)
    expected[0, 0] = (sigmoid(-offset) + sigmoid(4 + PATCHES - offset)) / 2
    torch.testing.assert_close(from_logits(logits, variant="head_sigmoid", center="mean"), expected)


def test_zscore_does_not_see_the_scale_of_the_logits() -> None:
    query, keys = row()
    plain, scaled = (cls_saliency(x, keys, center="zscore") for x in (query, 7 * query))
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        plain.logit().std(-1, unbiased=False), torch.ones(BATCH, dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_ranges_are_those_that_the_documentation_gives() -> None:
    query, keys = row(patches=576)
    assert cls_saliency(query, keys, variant="softmax").max() < 0.51
    assert cls_saliency(query, keys, variant="softmax").min() > 0.5
    assert cls_saliency(query, keys, variant="softmax_sum").min() > 0.5
    uniform = from_logits(torch.full((1, 2, PATCHES), 3.0), variant="relative")
    torch.testing.assert_close(uniform, torch.full((1, PATCHES), 0.5))


def test_the_mean_of_queries_gives_the_mean_of_their_rows() -> None:
    """What "received" relies on."""
    _, keys = row()
    queries = torch.randn(BATCH, HEADS, 7, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = torch.einsum("bhqd,bhnd->bhqn", queries, keys) / math.sqrt(DIM)
    saliency = cls_saliency(queries.mean(2), keys)
    torch.testing.assert_close(saliency, rows.mean((1, 2)).sigmoid(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_variant
def test_maps_of_half_precision_encoders_are_float32(variant: str, dtype: torch.dtype) -> None:
    """A softmax variant lives in the digits that bfloat16 does not have."""
    query, keys = row(patches=576)
    saliency = cls_saliency(query.to(dtype), keys.to(dtype), variant=variant)
    assert saliency.dtype == torch.float32
    torch.testing.assert_close(saliency.double(), cls_saliency(query, keys, variant=variant), rtol=0.02, atol=0.02)
    assert len(saliency[0].unique()) > 200


@pytest.mark.parametrize("center", ["none", "mean"])
@every_variant
def test_a_single_patch_is_an_image_too(variant: str, center: Any) -> None:
    assert cls_saliency(*row(patches=1), variant=variant, center=center).isfinite().all()


def test_no_patches_have_an_empty_map() -> None:
    assert cls_saliency(*row(patches=0)).shape == row(patches=0)[1].shape[::2]


def test_zscore_of_a_single_patch_is_finite() -> None:
    assert cls_saliency(*row(patches=1), center="zscore").isfinite().all()


@pytest.mark.parametrize(
    ("query", "keys"),
    [((2, 3, 1, 8), (2, 3, 20, 8)), ((2, 3, 8), (2, 20, 8)), ((2, 3, 8), (2, 4, 20, 8)), ((1, 3, 8), (2, 3, 20, 8))],
)
def test_shapes_that_do_not_fit_are_named(query: tuple[int, ...], keys: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        cls_saliency(torch.zeros(query), torch.zeros(keys))
    assert str(query) in str(error.value)
    assert str(keys) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "logits"}, "unknown saliency variant 'logits': did you mean 'logit'"),
        ({"center": "median"}, "center='median'.*'zscore'"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("inf")}, "temperature=inf"),
    ],
)
def test_options_that_do_not_fit_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls_saliency(*row(), **options)
