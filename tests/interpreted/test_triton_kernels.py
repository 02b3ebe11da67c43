"""The Triton kernels in the interpreter, against the loop in float64: values, gradients and what surrounds them."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.triton_cases import CASES, Case, check_against_oracle, tensors, with_gradients
from vision_remember import SELA, local_attention
from vision_remember.ops import triton_kernels, triton_local_attention

UNEVEN = Case((3, 4), (5, 7), window=2, levels=2)
OWNED = Case((3, 4), (6, 12), levels=2)
attend = functools.partial(local_attention, backend="triton")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """New memory holds NaN, so that nothing passes for written that was not."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each program, not for its size."""
    monkeypatch.setattr(triton_local_attention, "_TILE", 2**14)


def test_the_interpreter_is_on() -> None:
    assert triton_kernels.INTERPRETED


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_the_oracle(case: Case) -> None:
    check_against_oracle(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [UNEVEN, OWNED, Case((4, 6), (8, 12), bias=3)], ids=str)
def test_half_precision_comes_close(case: Case, dtype: torch.dtype) -> None:
    check_against_oracle(case, dtype)


@pytest.mark.parametrize("tile", [1024, 64, 8])
def test_the_size_of_a_tile_does_not_matter(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_local_attention, "_TILE", tile)
    check_against_oracle(Case((1, 3), (2, 4), dim=2, value_dim=3), torch.float32)


@pytest.mark.parametrize("case", [UNEVEN, OWNED], ids=["uneven", "one query per cell"])
def test_two_calls_give_the_same_bits(case: Case) -> None:
    first, second = (with_gradients(attend, tensors(case, torch.float32), **case.grids) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("case", "backward"),
    [
        (UNEVEN, 2),
        (Case((4, 4), (8, 8), window=2), 2),
        (OWNED, 1),
        (OWNED._replace(dim=72), 2),
    ],
    ids=["uneven", "blocks of queries", "one query per cell", "the same, no power of two"],
)
def test_one_launch_forward_and_one_or_two_backward(case: Case, backward: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two where several queries see a cell."""
    launches: Counter[str] = Counter()

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_kernels, name)

        def __getitem__(self, grid: Any) -> Any:
            launches[self.name] += 1
            return self.kernel[grid]

    for name in ("forward_kernel", "query_gradient_kernel", "cell_gradient_kernel"):
        monkeypatch.setattr(triton_kernels, name, Counted(name))
    output = attend(**tensors(case, torch.float32), **case.grids)
    assert launches == {"forward_kernel": 1}
    output.sum().backward()
    expected = ["forward_kernel", "query_gradient_kernel", "cell_gradient_kernel"][: 1 + backward]
    assert launches == dict.fromkeys(expected, 1)


@pytest.mark.parametrize("case", [UNEVEN, OWNED], ids=["uneven", "one query per cell"])
def test_memory_layout_of_the_arguments_does_not_matter(case: Case) -> None:
    """Heads usually come as a view of (B, N, heads * d), and the gradient of a sum is one number, expanded."""
    inputs = tensors(case, torch.float32)
    views = {
        name: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for name, x in inputs.items()
    }
    views["query"] = inputs["query"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not any(views[name].is_contiguous() for name in ("query", "key", "value", "saliency"))
    output, output_of_views = (attend(**given, **case.grids) for given in (inputs, views))
    assert torch.equal(output, output_of_views)
    output.sum().backward()
    output_of_views.backward(torch.ones_like(output))
    assert all(torch.equal(x.grad, views[name].grad) for name, x in inputs.items())


def test_heads_are_joined_without_a_copy() -> None:
    inputs = tensors(UNEVEN, torch.float32)
    output = attend(**inputs, **UNEVEN.grids)
    grads = torch.autograd.grad(output.sum(), [inputs[name] for name in ("query", "key", "value")])
    assert all(x.transpose(1, 2).is_contiguous() for x in (output, *grads))


@pytest.mark.parametrize("case", [UNEVEN, OWNED], ids=["uneven", "one query per cell"])
@pytest.mark.parametrize("wanted", ["query", "value", "saliency", "bias"])
def test_only_wanted_gradients_come(wanted: str, case: Case) -> None:
    inputs = tensors(case, torch.float32)
    everything = dict(zip(inputs, with_gradients(attend, inputs, **case.grids)[1:], strict=True))
    inputs = {name: x.detach().requires_grad_(name == wanted) for name, x in inputs.items()}
    output = attend(**inputs, **case.grids)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(inputs[wanted].grad, everything[wanted])
    assert [name for name, x in inputs.items() if x.grad is not None] == [wanted]


def test_logits_far_from_zero_give_no_nan() -> None:
    inputs = tensors(UNEVEN, torch.float32)
    with torch.no_grad():
        inputs["query"] *= 1e4
    assert all(result.isfinite().all() for result in with_gradients(attend, inputs, **UNEVEN.grids))


def test_a_bias_of_minus_infinity_hides_a_cell() -> None:
    """The first steps see nothing at all."""
    case = Case((2, 3), (4, 6), bias=3)
    inputs = tensors(case, torch.float32)
    with torch.no_grad():
        inputs["bias"][..., :2] = -math.inf
    results = with_gradients(attend, inputs, **case.grids)
    expected = with_gradients(functools.partial(local_attention, backend="windowed"), inputs, **case.grids)
    torch.testing.assert_close(results, expected, rtol=0, atol=1e-5)


def test_no_images_are_no_error() -> None:
    inputs = tensors(UNEVEN, torch.float32)
    given = {name: x if name == "bias" else x[:0] for name, x in inputs.items()}
    output = attend(**given, **UNEVEN.grids)
    assert output.shape == (0, *tensors(UNEVEN, torch.float32)["query"].shape[1:])
    output.sum().backward()
    assert torch.equal(inputs["bias"].grad, torch.zeros_like(inputs["bias"]))


def test_gradients_cannot_be_differentiated_again() -> None:
    inputs = tensors(UNEVEN, torch.float32)
    output = attend(**inputs, **UNEVEN.grids)
    (grad,) = torch.autograd.grad(output.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='windowed' can"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["query", "key", "value", "saliency", "bias"])
def test_forward_derivatives_are_refused_not_zero(name: str) -> None:
    """Without gradients nothing else would tell: autograd passes over an operator that has none."""
    inputs = {key: x.detach() for key, x in tensors(UNEVEN, torch.float32).items()}
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivatives; backend='windowed' can"):
        attend(**{**inputs, name: forward_ad.make_dual(inputs[name], inputs[name])}, **UNEVEN.grids)
    with pytest.raises(RuntimeError, match="forward-mode derivatives; backend='windowed' can"):
        jvp(lambda x: attend(**{**inputs, name: x}, **UNEVEN.grids), (inputs[name],), (inputs[name],))


def test_auto_takes_forward_derivatives_where_kernels_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_local_attention, "kernels_suit", lambda *_: True)
    inputs = {key: x.detach() for key, x in tensors(UNEVEN, torch.float32).items()}
    found = []
    for backend in ("auto", "naive"):
        given = functools.partial(local_attention, backend=backend, **UNEVEN.grids)
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            dual = {key: forward_ad.make_dual(x, x + 1) for key, x in inputs.items()}
            found.append(forward_ad.unpack_dual(given(**dual)).tangent)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [UNEVEN, OWNED], ids=["uneven", "one query per cell"])
def test_what_was_saved_may_come_back_in_another_layout(case: Case) -> None:
    def packed(x: Tensor) -> Tensor:
        return x.transpose(-1, -2).contiguous()

    inputs = tensors(case, torch.float32)
    expected = with_gradients(attend, inputs, **case.grids)
    with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x.transpose(-1, -2)):
        found = with_gradients(attend, inputs, **case.grids)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_pytorch_finds_no_fault_with_the_operators() -> None:
    """Schema, shapes and strides of the stand-ins for tracing, registration of the gradients, tracing of both."""
    case = Case((1, 3), (2, 4))
    inputs = tensors(case, torch.float32)
    sizes = (*case.query_grid, *case.key_grid, case.levels, case.window)
    forward, backward = (getattr(torch.ops.vision_remember, f"local_attention{end}") for end in ("", "_backward"))
    torch.library.opcheck(forward, (*inputs.values(), *sizes))
    plain = [x.detach() for x in inputs.values()]
    out, lse = forward(*plain, *sizes)
    torch.library.opcheck(backward, (torch.ones_like(out), *plain, out, lse, True, True, *sizes))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_into_one_graph(compiler: str) -> None:
    inputs = tensors(UNEVEN, torch.float32)
    expected = with_gradients(attend, inputs, **UNEVEN.grids)
    torch.compiler.reset()
    compiled = torch.compile(functools.partial(attend, **UNEVEN.grids), fullgraph=True, backend=compiler)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(compiled, inputs), expected, strict=True))


@pytest.mark.parametrize("fusion", ["concat", "tokens"])
def test_sela_is_the_same_module_with_it(fusion: str) -> None:
    tokens, features, saliency = torch.randn(2, 12, 32), torch.randn(2, 35, 48), torch.rand(2, 35)
    grids = {"token_grid": (3, 4), "feature_grid": (5, 7)}
    options: dict[str, Any] = {"num_levels": 3, "fusion": fusion, "zero_init": False, "position": "learned"}
    found = []
    for backend in ("windowed", "triton"):
        torch.manual_seed(0)
        module = SELA(32, 48, backend=backend, **options)
        update = module(tokens, features, saliency=saliency, **grids)
        update.square().sum().backward()
        weights = module.attention_weights(tokens, features, **grids)
        found.append([update, weights, *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_unknown_dtypes_and_wide_heads_are_named() -> None:
    inputs = tensors(UNEVEN, torch.float64)
    with pytest.raises(ValueError, match=r"torch\.float64: expected torch\.float32, torch\.float16, torch\.bfloat16"):
        attend(**inputs, **UNEVEN.grids)
    inputs = tensors(UNEVEN._replace(dim=257), torch.float32)
    with pytest.raises(ValueError, match="heads of 257 channels: expected at most 256"):
        attend(**inputs, **UNEVEN.grids)
