"""Local attention over several levels of keys: a region holds its cells of every level, under one softmax."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.reference import bias_shapes, global_bias
from vision_remember import local_attention
from vision_remember.grid import Grid
from vision_remember.ops import BACKENDS, naive_local_attention

EVEN: tuple[Grid, Grid] = ((4, 6), (8, 12))
UNEVEN: tuple[Grid, Grid] = ((4, 5), (7, 9))
ON_CPU = [name for name in BACKENDS if name != "triton"]
HEADS, DIM = 2, 3

every_pair_of_grids = pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=["even", "uneven"])


def tensors(query_grid: Grid, key_grid: Grid, levels: int, window: int, dims: int | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cells = levels * math.prod(key_grid)
    shapes = {
        "query": (2, HEADS, math.prod(query_grid), DIM),
        "key": (2, HEADS, cells, DIM),
        "value": (2, HEADS, cells, DIM + 1),
        "saliency": (2, cells),
    }
    if dims is not None:
        *leading, region = bias_shapes(HEADS, query_grid, key_grid, window)[dims]
        shapes["bias"] = (*leading, levels * region)
    return {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in shapes.items()}


def masked_global(inputs: dict[str, Tensor], grids: tuple[Grid, Grid], levels: int, window: int) -> Tensor:
    """One global attention over the cells of all levels, its mask and bias put together level by level."""
    bias = inputs.get(
        "bias", torch.zeros(bias_shapes(HEADS, *grids, window)[4], dtype=torch.float64).repeat(1, 1, 1, levels)
    )
    mask = torch.cat([global_bias(part, *grids, window) for part in bias.chunk(levels, dim=-1)], dim=-1)
    weights = F.softmax(inputs["query"] @ inputs["key"].mT / math.sqrt(DIM) + mask, dim=-1)
    return weights @ (inputs["value"] * inputs["saliency"][:, None, :, None])


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@every_pair_of_grids
@pytest.mark.parametrize("backend", ON_CPU)
def test_it_is_masked_global_attention_over_all_levels(
    backend: str, grids: tuple[Grid, Grid], with_bias: bool, window: int, levels: int
) -> None:
    dims = (3 if grids is EVEN and window < 3 else 4) if with_bias else None
    inputs = tensors(*grids, levels, window, dims)
    result = local_attention(
        **inputs, query_grid=grids[0], key_grid=grids[1], key_levels=levels, window=window, backend=backend
    )
    torch.testing.assert_close(result, masked_global(inputs, grids, levels, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_are_those_of_finite_differences(backend: str) -> None:
    grids = ((2, 2), (3, 4))
    inputs = {k: x.requires_grad_() for k, x in tensors(*grids, 2, 1, 4).items()}

    def op(*values: Tensor) -> Tensor:
        arguments: dict[str, Any] = dict(zip(inputs, values, strict=True))
        return local_attention(**arguments, query_grid=grids[0], key_grid=grids[1], key_levels=2, backend=backend)

    assert torch.autograd.gradcheck(op, tuple(inputs.values()), fast_mode=True)


def test_levels_alike_are_one_level() -> None:
    """Each level then gets an equal share of every weight."""
    inputs = tensors(*UNEVEN, 1, 1, None)
    tripled = {k: x if k == "query" else x.repeat_interleave(3, 0).unflatten(0, (2, 3)) for k, x in inputs.items()}
    tripled = {
        k: x if k == "query" else torch.cat(x.unbind(1), dim=-2 if x.ndim > 3 else -1) for k, x in tripled.items()
    }
    grids = {"query_grid": UNEVEN[0], "key_grid": UNEVEN[1]}
    one = naive_local_attention(**inputs, **grids)
    torch.testing.assert_close(local_attention(**tripled, **grids, key_levels=3), one, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("levels", "message"),
    [(0, "key_levels=0"), (5, "96 positions: expected key_levels=5"), (2, "48 positions, but key_grid=8x12 has 96")],
)
def test_levels_that_do_not_fit_are_errors(levels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_attention(**tensors(*EVEN, 1, 1, None), query_grid=EVEN[0], key_grid=EVEN[1], key_levels=levels)
