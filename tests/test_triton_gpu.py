"""The Triton kernels on a GPU. Without one, ``tests/interpreted`` runs them; bfloat16 rounds as it should only here."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.triton_cases import CASES, Case, check_against_oracle, tensors, with_gradients
from vision_remember import SELA, local_attention
from vision_remember.ops import triton_local_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

UNEVEN = Case((14, 14), (27, 27), window=2, levels=2, dim=64, value_dim=64)
LARGE = Case((12, 12), (24, 24), dim=64, value_dim=64, bias=3)


@pytest.mark.parametrize("dtype", triton_local_attention.DTYPES)
@pytest.mark.parametrize("case", [*CASES, UNEVEN, LARGE], ids=str)
def test_output_and_gradients_are_those_of_the_oracle(case: Case, dtype: torch.dtype) -> None:
    check_against_oracle(case, dtype, "cuda")


@pytest.mark.parametrize("case", [UNEVEN, LARGE], ids=str)
def test_two_calls_give_the_same_bits(case: Case) -> None:
    attend = functools.partial(local_attention, **case.grids, backend="triton")
    first, second = (with_gradients(attend, tensors(case, torch.bfloat16, "cuda")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_auto_takes_the_kernels() -> None:
    inputs = tensors(LARGE, torch.bfloat16, "cuda")
    auto, triton = (local_attention(**inputs, **LARGE.grids, backend=backend) for backend in ("auto", "triton"))
    assert torch.equal(auto, triton)


def test_auto_compiles_into_one_graph() -> None:
    inputs = tensors(LARGE, torch.bfloat16, "cuda")
    attend = functools.partial(local_attention, **LARGE.grids)
    expected = with_gradients(attend, inputs)
    torch.compiler.reset()
    results = with_gradients(torch.compile(attend, fullgraph=True), inputs)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_replays_it(dtype: torch.dtype) -> None:
    module = SELA(256, 192, num_levels=3, zero_init=False, backend="triton").to("cuda", dtype)
    grids = {"token_grid": (14, 14), "feature_grid": (27, 27)}
    tokens, features = (torch.randn(2, n, c, device="cuda", dtype=dtype) for n, c in ((196, 256), (729, 192)))
    with torch.no_grad():
        expected = module(tokens, features, **grids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(tokens, features, **grids)
        graph.replay()
    torch.testing.assert_close(captured, expected)


def test_it_never_waits_for_the_gpu() -> None:
    inputs = tensors(UNEVEN, torch.float16, "cuda")
    attend = functools.partial(local_attention, **UNEVEN.grids, backend="triton")
    attend(**inputs).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(**inputs).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
