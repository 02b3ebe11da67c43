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
            dual = [forward_ad.make_dual(x, tangent) if x is inputs[1] else x for x in inputs]
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
