"""One query per region with a bias, on a CPU: derivatives of every kind, and no more memory than gradients take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from tests.launches import Launches, fake
from tests.reference import masked_global_attention
from tests.test_local_attention import tensors
from vision_remember import local_attention
from vision_remember.grid import Grid
from vision_remember.interactions import SELA
from vision_remember.ops import one_query
from vision_remember.ops.windowed import attend_regions

REGIONS, HEADS, CELLS, DIM = 5, 2, 3, 3
NAMES = ("query", "key", "value", "bias")


@pytest.fixture(autouse=True, params=[1, 1 << 19], ids=["region by region", "all regions at once"])
def _regions_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_query, "_BYTES_AT_A_TIME", request.param)


def arguments(
    value_dim: int = 4, *, regions: int = REGIONS, per_region: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Query, key, value and bias that want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (regions, HEADS, 1, DIM),
        (regions, HEADS, CELLS, DIM),
        (regions, HEADS, CELLS, value_dim),
        (*([regions] if per_region else []), HEADS, 1, CELLS),
    ]
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(dtype).requires_grad_() for x in made)


def explicit(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias).softmax(-1) @ value


def squared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs).square().sum()


@pytest.mark.parametrize("per_region", [False, True])
@pytest.mark.parametrize("value_dim", [2, 3, 4])
def test_gradients_are_those_of_finite_differences(value_dim: int, per_region: bool) -> None:
    inputs = arguments(value_dim, per_region=per_region)
    torch.testing.assert_close(attend_regions(*inputs), explicit(*inputs), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(attend_regions, inputs, check_forward_ad=True, check_batched_grad=True)


def test_second_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradgradcheck(attend_regions, arguments(), check_batched_grad=True)


def test_transforms_go_through() -> None:
    inputs = arguments()
    places = (0, 1, 2, 3)
    for transform in (torch.func.grad, torch.func.hessian):
        results = [transform(squared(function), places)(*inputs) for function in (attend_regions, explicit)]
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    batches = [torch.stack([x, x + 1, 2 * x]) for x in inputs]
    results = [torch.vmap(torch.func.grad(squared(f), places))(*batches) for f in (attend_regions, explicit)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_forward_derivatives_of_a_gradient() -> None:
    """A tangent that only one argument carries, through the backward pass too."""
    inputs, tangent = arguments(), torch.ones(REGIONS, HEADS, CELLS, DIM, dtype=torch.float64)
    found = []
    for function in (attend_regions, explicit):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(x, tangent) if name == "key" else x for name, x in zip(NAMES, inputs)]  # noqa: B905
            gradients = torch.autograd.grad(squared(function)(*dual), inputs, create_graph=True)
            found.append([forward_ad.unpack_dual(x).tangent for x in gradients])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wanted", NAMES)
def test_only_the_gradients_that_are_wanted_are_made(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[bool, ...]] = []
    original = one_query._gradients_in_parts

    def watched(*given: Any) -> tuple[Tensor | None, ...]:
        gradients = original(*given)
        made.append(tuple(x is not None for x in gradients))
        return gradients

    monkeypatch.setattr(one_query, "_gradients_in_parts", watched)
    inputs = [x.detach().requires_grad_(name == wanted) for name, x in zip(NAMES, arguments(), strict=True)]
    leaf = inputs[NAMES.index(wanted)]
    results = [torch.autograd.grad(squared(f)(*inputs), leaf)[0] for f in (attend_regions, explicit)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    assert made == [tuple(name == wanted for name in NAMES)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_it_has_the_same_gradients(reentrant: bool) -> None:
    """Reentrant checkpoints compute without gradients first, which is another form."""
    inputs = arguments()
    for x in inputs:
        x.grad = None
    checkpoint(attend_regions, *inputs, use_reentrant=reentrant).square().sum().backward()
    expected = torch.autograd.grad(squared(explicit)(*inputs), inputs)
    torch.testing.assert_close([x.grad for x in inputs], list(expected), rtol=0, atol=1e-12)


def test_compiled_it_is_one_graph_with_the_same_gradients() -> None:
    inputs = arguments()
    torch.compiler.reset()
    compiled = torch.compile(attend_regions, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(squared(f)(*inputs), inputs) for f in (compiled, attend_regions)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_a_graph_of_it_can_be_differentiated() -> None:
    inputs = arguments()
    graph = make_fx(lambda *inputs: attend_regions(*inputs))(*inputs)
    results = [torch.autograd.grad(squared(f)(*inputs), inputs) for f in (graph, attend_regions)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_close(dtype: torch.dtype) -> None:
    inputs = arguments(dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output, expected = attend_regions(*inputs), explicit(*exact)
    assert output.dtype == dtype
    gradients = torch.autograd.grad(output.square().sum(), inputs)
    assert [x.dtype for x in gradients] == [dtype] * 4
    results = [output, *gradients], [expected, *torch.autograd.grad(expected.square().sum(), exact)]
    for found, reference in zip(*results, strict=True):
        scale = reference.abs().max().item()
        torch.testing.assert_close(found.double(), reference, rtol=0, atol=4 * scale * torch.finfo(dtype).eps)


def test_no_regions_have_no_gradients() -> None:
    inputs = arguments(regions=0)
    gradients = torch.autograd.grad(attend_regions(*inputs).sum(), inputs)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    assert gradients[3].count_nonzero() == 0


def test_training_holds_the_gradients_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the size of all keys, or of all values, besides the gradients of both."""
    monkeypatch.setattr(one_query, "_BYTES_AT_A_TIME", 1 << 19)
    regions, heads, cells, dim = 36 * 36, 14, 4, 64

    def peak(attend: Callable[..., Tensor]) -> int:
        with fake("cpu") as empty:
            shapes = ((1, dim), (cells, dim), (cells, dim))
            query, key, value = (empty(regions, n, heads, d, dtype=torch.float32).transpose(1, 2) for n, d in shapes)
            bias = empty(heads, 1, cells, dtype=torch.float32)
            leaves = [x.requires_grad_() for x in (query, key, value, bias)]
            with Launches() as launches:
                torch.autograd.grad(attend(*leaves).sum(), leaves)
        return launches.peak

    keys = regions * heads * cells * dim * 4
    needed = 2 * keys + 2 * keys // cells  # gradients, of the queries too, and what was read
    assert needed < peak(attend_regions) < 1.1 * needed
    monkeypatch.setattr(one_query, "is_plain", lambda *_: False)
    assert peak(attend_regions) > needed + keys // 2


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
