"""The public op, every back-end of it, against a masked global attention that shares no code with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.reference import bias_shapes, masked_global_attention
from vision_remember import local_attention
from vision_remember.grid import Grid
from vision_remember.ops import BACKENDS, naive_local_attention

GRIDS: list[tuple[Grid, Grid]] = [
    ((12, 12), (24, 24)),
    ((14, 14), (27, 27)),
    ((13, 13), (27, 27)),
    ((8, 12), (16, 36)),
    ((1, 6), (1, 13)),  # one row
    ((6, 1), (12, 1)),  # one column
    ((1, 1), (3, 4)),  # one token
    ((5, 4), (5, 4)),  # as many tokens as cells
    ((5, 7), (3, 4)),  # more tokens than cells
]
EVEN, UNEVEN = GRIDS[3], ((5, 4), (7, 9))
# Needs a GPU and cannot do float64; it has tests of its own.
ON_CPU = [name for name in BACKENDS if name != "triton"]
BATCH, HEADS, DIM, VALUE_DIM = 2, 2, 3, 5


def grid_name(grids: tuple[Grid, Grid]) -> str:
    (h, w), (rows, columns) = grids
    return f"{rows}x{columns} to {h}x{w}"


def is_even(query_grid: Grid, key_grid: Grid, window: int) -> bool:
    return all(H % h == 0 and h % window == 0 for h, H in zip(query_grid, key_grid, strict=True))


def tensors(
    query_grid: Grid,
    key_grid: Grid,
    window: int = 1,
    *,
    saliency: bool = False,
    bias: int | None = None,
    dtype: torch.dtype = torch.float64,
    dim: int = DIM,
) -> dict[str, Tensor]:
    """Random arguments that want gradients; ``bias`` is the number of its dimensions."""
    generator = torch.Generator().manual_seed(0)
    tokens, cells = math.prod(query_grid), math.prod(key_grid)
    shapes: dict[str, tuple[int, ...]] = {
        "query": (BATCH, HEADS, tokens, dim),
        "key": (BATCH, HEADS, cells, dim),
        "value": (BATCH, HEADS, cells, VALUE_DIM),
    }
    if saliency:
        shapes["saliency"] = (BATCH, cells)
    if bias is not None:
        shapes["bias"] = bias_shapes(HEADS, query_grid, key_grid, window)[bias]
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}


def with_gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor], **rest: Any) -> list[Tensor]:
    """The output of a function, and the gradient of each input for one fixed cotangent."""
    output = function(**inputs, **rest)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad(output, list(inputs.values()), cotangent.to(output.dtype))]


@functools.cache
def expected(query_grid: Grid, key_grid: Grid, window: int, everything: bool) -> tuple[Any, ...]:
    """Inputs and what the reference makes of them, once for all back-ends."""
    bias = (3 if is_even(query_grid, key_grid, window) else 4) if everything else None
    inputs = tensors(query_grid, key_grid, window, saliency=everything, bias=bias)
    rest = {"query_grid": query_grid, "key_grid": key_grid, "window": window}
    return inputs, rest, with_gradients(masked_global_attention, inputs, **rest)


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "saliency and bias"])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("grids", GRIDS, ids=grid_name)
@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "auto"])
def test_output_and_gradients_are_those_of_masked_global_attention(
    backend: str, grids: tuple[Grid, Grid], window: int, everything: bool
) -> None:
    inputs, rest, reference = expected(*grids, window, everything)
    results = with_gradients(functools.partial(local_attention, backend=backend), inputs, **rest)
    torch.testing.assert_close(results, reference, rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_backend_equals_the_oracle_on_any_grids(data: st.DataObject) -> None:
    side = st.integers(1, 7)
    query_grid, key_grid = (data.draw(st.tuples(side, side), label=name) for name in ("query_grid", "key_grid"))
    window = data.draw(st.integers(1, 4), label="window")
    biases = [None, 4, 3] if is_even(query_grid, key_grid, window) else [None, 4]
    inputs = tensors(
        query_grid,
        key_grid,
        window,
        saliency=data.draw(st.booleans(), label="saliency"),
        bias=data.draw(st.sampled_from(biases), label="bias"),
    )
    rest = {"query_grid": query_grid, "key_grid": key_grid, "window": window}
    oracle = with_gradients(naive_local_attention, inputs, **rest)
    for backend in ON_CPU:
        results = with_gradients(functools.partial(local_attention, backend=backend), inputs, **rest)
        torch.testing.assert_close(results, oracle, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("grids", [((2, 2), (4, 4)), ((2, 3), (3, 4))], ids=grid_name)
@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_are_those_of_finite_differences(backend: str, grids: tuple[Grid, Grid], window: int) -> None:
    query_grid, key_grid = grids
    bias = 3 if is_even(query_grid, key_grid, window) else 4
    inputs = tensors(query_grid, key_grid, window, saliency=True, bias=bias)

    def op(*values: Tensor) -> Tensor:
        arguments = dict(zip(inputs, values, strict=True))
        return local_attention(**arguments, query_grid=query_grid, key_grid=key_grid, window=window, backend=backend)

    assert torch.autograd.gradcheck(op, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("grids", GRIDS, ids=grid_name)
@pytest.mark.parametrize("backend", ON_CPU)
def test_without_preference_it_is_adaptive_average_pooling(backend: str, grids: tuple[Grid, Grid]) -> None:
    query_grid, key_grid = grids
    inputs = tensors(query_grid, key_grid)
    inputs["query"] = torch.zeros_like(inputs["query"])
    output = local_attention(**inputs, query_grid=query_grid, key_grid=key_grid, backend=backend)
    cells = inputs["value"].transpose(2, 3).flatten(0, 1).unflatten(2, key_grid)
    pooled = F.adaptive_avg_pool2d(cells, query_grid).reshape(BATCH, HEADS, VALUE_DIM, -1).transpose(2, 3)
    torch.testing.assert_close(output, pooled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=grid_name)
@pytest.mark.parametrize("backend", ON_CPU)
def test_one_block_for_all_queries_is_global_attention(backend: str, grids: tuple[Grid, Grid]) -> None:
    inputs = tensors(*grids)
    output = local_attention(**inputs, query_grid=grids[0], key_grid=grids[1], window=12, backend=backend)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(**inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
def test_one_cell_per_query_returns_its_value_times_its_saliency(backend: str) -> None:
    inputs = tensors((3, 4), (3, 4), saliency=True)
    output = local_attention(**inputs, query_grid=(3, 4), key_grid=(3, 4), backend=backend)
    torch.testing.assert_close(output, inputs["value"] * inputs["saliency"][:, None, :, None], rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("backend", ON_CPU)
def test_both_forms_of_bias_mean_the_same_on_even_grids(backend: str, window: int) -> None:
    query_grid, key_grid = (4, 6), (8, 18)
    inputs = tensors(query_grid, key_grid, window, bias=3)
    op = functools.partial(local_attention, query_grid=query_grid, key_grid=key_grid, window=window, backend=backend)
    short = op(**inputs)
    per_block = bias_shapes(HEADS, query_grid, key_grid, window)[4]
    inputs["bias"] = inputs["bias"].unsqueeze(1).expand(per_block)
    torch.testing.assert_close(op(**inputs), short, rtol=0, atol=1e-14)


@pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=grid_name)
@pytest.mark.parametrize("backend", ON_CPU)
def test_memory_layout_of_the_arguments_does_not_matter(backend: str, grids: tuple[Grid, Grid]) -> None:
    """Heads usually come as a view of (B, N, heads * d)."""
    inputs = tensors(*grids)
    op = functools.partial(local_attention, query_grid=grids[0], key_grid=grids[1], window=2, backend=backend)
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    assert not any(view.is_contiguous() for view in views.values())
    assert torch.equal(op(**views), op(**inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=grid_name)
@pytest.mark.parametrize("backend", ON_CPU)
def test_half_precision_keeps_its_dtype_and_comes_close(
    backend: str, grids: tuple[Grid, Grid], dtype: torch.dtype
) -> None:
    rest = {"query_grid": grids[0], "key_grid": grids[1], "window": 2}
    inputs = tensors(*grids, 2, saliency=True, bias=4, dtype=dtype)
    output = local_attention(**inputs, **rest, backend=backend)
    assert output.dtype == dtype
    exact = masked_global_attention(**{name: x.double() for name, x in inputs.items()}, **rest)
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ON_CPU)
def test_logits_far_from_zero_give_no_nan(backend: str) -> None:
    inputs = tensors(*UNEVEN)
    with torch.no_grad():
        inputs["query"] *= 1e4
    results = with_gradients(
        functools.partial(local_attention, backend=backend), inputs, query_grid=UNEVEN[0], key_grid=UNEVEN[1], window=2
    )
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("backend", ON_CPU)
def test_no_images_are_no_error(backend: str) -> None:
    inputs = {name: x[:0] for name, x in tensors(*UNEVEN, saliency=True).items()}
    output = local_attention(**inputs, query_grid=UNEVEN[0], key_grid=UNEVEN[1], backend=backend)
    assert output.shape == (0, HEADS, math.prod(UNEVEN[0]), VALUE_DIM)


@pytest.mark.parametrize("grids", [((4, 6), (8, 12)), UNEVEN], ids=grid_name)
def test_compiles_without_graph_breaks(grids: tuple[Grid, Grid]) -> None:
    op = functools.partial(local_attention, query_grid=grids[0], key_grid=grids[1], window=2)
    inputs = tensors(*grids, 2, saliency=True, bias=4)
    torch.compiler.reset()  # otherwise the second grids compile with symbolic shapes, ten times slower
    compiled = torch.compile(op, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**inputs), op(**inputs))


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"query": (2, 2, 6)}, ["(2, 2, 6)"]),
        ({"query": (3, 2, 6, 3)}, ["(3, 2, 6, 3)", "(2, 2, 24, 3)"]),
        ({"key": (2, 1, 24, 3)}, ["(2, 1, 24, 3)", "(2, 2, 6, 3)"]),
        ({"key": (2, 2, 24, 4)}, ["(2, 2, 24, 4)", "(2, 2, 6, 3)"]),
        ({"value": (2, 2, 12, 5)}, ["(2, 2, 12, 5)", "(2, 2, 24, 3)"]),
        ({"saliency": (2, 12)}, ["(2, 12)", "(2, 24)"]),
        ({"saliency": (2, 2, 24)}, ["(2, 2, 24)", "(2, 24)"]),
        ({"bias": (2, 4)}, ["(2, 4)", "(2, 6, 1, 4)"]),
        ({"bias": (2, 1, 6)}, ["(2, 1, 6)", "(2, 1, 4)"]),
        ({"bias": (1, 1, 4)}, ["(1, 1, 4)", "(2, 1, 4)"]),
        ({"bias": (2, 5, 1, 4)}, ["(2, 5, 1, 4)", "(2, 6, 1, 4)"]),
        ({"query_grid": (3, 3)}, ["6", "3x3", "9"]),
        ({"key_grid": (4, 5)}, ["24", "4x5", "20"]),
        ({"query_grid": (0, 6)}, ["(0, 6)"]),
        ({"key_grid": (-4, -6)}, ["(-4, -6)"]),
        ({"key_grid": (24,)}, ["(24,)"]),
        ({"key_grid": (4.0, 6.0)}, ["(4.0, 6.0)"]),
        ({"window": 0}, ["window=0"]),
        ({"window": -2}, ["window=-2"]),
        ({"window": 1.5}, ["window=1.5"]),
        ({"key_levels": 2.0}, ["key_levels=2.0"]),
    ],
)
def test_arguments_that_do_not_fit_are_errors_that_name_the_numbers(change: dict[str, Any], numbers: list[str]) -> None:
    arguments: dict[str, Any] = {**tensors((2, 3), (4, 6)), "query_grid": (2, 3), "key_grid": (4, 6)}
    tensor_names = ("query", "key", "value", "saliency", "bias")
    arguments |= {k: torch.zeros(v, dtype=torch.float64) if k in tensor_names else v for k, v in change.items()}
    with pytest.raises(ValueError, match=r".") as error:
        local_attention(**arguments)
    assert all(number in str(error.value) for number in numbers), str(error.value)


@pytest.mark.parametrize(
    ("query_grid", "key_grid", "window"), [((2, 3), (4, 7), 1), ((3, 3), (6, 6), 2)], ids=["cells", "window"]
)
def test_one_bias_for_all_blocks_needs_even_grids(query_grid: Grid, key_grid: Grid, window: int) -> None:
    inputs = tensors(query_grid, key_grid, window, bias=3)
    with pytest.raises(ValueError, match="region_bias"):
        local_attention(**inputs, query_grid=query_grid, key_grid=key_grid, window=window)


@pytest.mark.parametrize("name", ["query", "key", "value", "saliency", "bias"])
def test_differing_dtypes_and_devices_are_named(name: str) -> None:
    inputs = tensors((2, 3), (4, 6), saliency=True, bias=3)
    for changed, found in ((inputs[name].float(), "torch.float32"), (inputs[name].to("meta"), "meta")):
        with pytest.raises(ValueError, match=f"{name} {found}"):
            local_attention(**{**inputs, name: changed}, query_grid=(2, 3), key_grid=(4, 6))


def test_whole_numbers_are_no_queries() -> None:
    inputs = {name: tensor.long() for name, tensor in tensors((2, 3), (4, 6)).items()}
    with pytest.raises(ValueError, match=r"query torch.int64: expected a floating dtype"):
        local_attention(**inputs, query_grid=(2, 3), key_grid=(4, 6))


@pytest.mark.parametrize("bias", [None, 3], ids=["no bias", "bias"])
def test_windowed_gradients_can_be_differentiated_again(bias: int | None) -> None:
    """Where PyTorch's own attention runs inside the regions, on its plain path alone."""
    given = tensors((1, 2), (2, 4), bias=bias, dim=1)

    def attend(*values: Tensor) -> Tensor:
        named = dict(zip(given, values, strict=True))
        return local_attention(**named, query_grid=(1, 2), key_grid=(2, 4), backend="windowed")

    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(attend, tuple(given.values()))
        assert torch.autograd.gradcheck(attend, tuple(given.values()), check_forward_ad=True)


def test_an_unknown_backend_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'windowed'"):
        local_attention(**tensors((2, 3), (4, 6)), query_grid=(2, 3), key_grid=(4, 6), backend="windwed")
