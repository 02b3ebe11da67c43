"""Deformable sampling against its definition, one point at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deformable_detr import modeling_deformable_detr

from vision_remember.grid import Grid
from vision_remember.interactions import DeformableAttention
from vision_remember.ops import deformable_sample

GRIDS: list[list[Grid]] = [[(4, 4)], [(3, 7)], [(1, 1)], [(1, 6), (5, 2)], [(8, 8), (4, 4), (2, 3)]]


def inputs(
    grids: list[Grid], *, queries: int = 5, heads: int = 2, points: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Values, locations (some outside the image) and weights for two images."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, math.prod(grid), heads, 4, dtype=dtype, generator=generator) for grid in grids]
    shape = (2, queries, heads, len(grids), points)
    locations = torch.rand(*shape, 2, dtype=dtype, generator=generator) * 1.6 - 0.3
    return values, locations, torch.randn(shape, dtype=dtype, generator=generator)


def value_at(value: Tensor, grid: Grid, x: float, y: float) -> Tensor:
    """The bilinear value of (H*W, d) at a place in the image; cells outside count as zero."""
    column, row = x * grid[1] - 0.5, y * grid[0] - 0.5
    total = torch.zeros_like(value[0])
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < grid[0] and 0 <= j < grid[1]:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * value[i * grid[1] + j]
    return total


def naive_sample(values: list[Tensor], locations: Tensor, weights: Tensor, grids: list[Grid]) -> Tensor:
    batch, queries, heads, _, points = weights.shape
    out = torch.zeros(batch, queries, heads, values[0].shape[-1], dtype=values[0].dtype)
    for b in range(batch):
        for n in range(queries):
            for m in range(heads):
                for level, grid in enumerate(grids):
                    for p in range(points):
                        x, y = locations[b, n, m, level, p].tolist()
                        out[b, n, m] += weights[b, n, m, level, p] * value_at(values[level][b, :, m], grid, x, y)
    return out


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_equals_its_definition(grids: list[Grid]) -> None:
    values, locations, weights = inputs(grids)
    sampled = deformable_sample(values, locations, weights, grids=grids)
    torch.testing.assert_close(sampled, naive_sample(values, locations, weights, grids), rtol=1e-12, atol=1e-12)


def test_a_cells_centre_reads_the_cell() -> None:
    grid = (3, 5)
    (value,), _, _ = inputs([grid])
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    centres = torch.stack(((columns + 0.5) / 5, (rows + 0.5) / 3), dim=-1)
    locations = centres.reshape(1, 15, 1, 1, 1, 2).expand(2, -1, 2, -1, -1, -1)
    torch.testing.assert_close(deformable_sample([value], locations, torch.ones(2, 15, 2, 1, 1), grids=[grid]), value)


def test_weights_are_used_as_they_are() -> None:
    values, locations, weights = inputs([(4, 6)])
    once = deformable_sample(values, locations, weights, grids=[(4, 6)])
    torch.testing.assert_close(deformable_sample(values, locations, 3 * weights, grids=[(4, 6)]), 3 * once)


@pytest.mark.parametrize("grids", [[(3, 4)], [(2, 3), (4, 1)]], ids=str)
def test_gradients(grids: list[Grid]) -> None:
    values, locations, weights = inputs(grids, queries=2, points=2)
    tensors = [tensor.requires_grad_() for tensor in (*values, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda *given: deformable_sample(given[:-2], given[-2], given[-1], grids=grids), tensors
    )


def test_equals_deformable_detrs() -> None:
    grids: list[Grid] = [(6, 4), (3, 5)]
    values, locations, weights = inputs(grids)
    theirs = modeling_deformable_detr.MultiScaleDeformableAttention()(
        torch.cat(values, dim=1), torch.tensor(grids), grids, None, locations, weights, 64
    )
    torch.testing.assert_close(deformable_sample(values, locations, weights, grids=grids).flatten(2), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_read_at_precise_places(dtype: torch.dtype) -> None:
    """The result is that of float32, rounded once."""
    grids: list[Grid] = [(24, 24)]
    values, locations, weights = inputs(grids, dtype=torch.float32)
    values, weights = [value.to(dtype) for value in values], weights.to(dtype)
    sampled = deformable_sample(values, locations, weights, grids=grids)
    precise = deformable_sample([value.float() for value in values], locations, weights.float(), grids=grids)
    assert sampled.dtype == dtype
    assert torch.equal(sampled, precise.to(dtype))


def test_inputs_are_left_as_they_were() -> None:
    values, locations, weights = inputs([(4, 4)])
    before = [tensor.clone() for tensor in (*values, locations, weights)]
    deformable_sample(values, locations, weights, grids=[(4, 4)])
    assert all(map(torch.equal, (*values, locations, weights), before))


def test_compiles_without_graph_breaks() -> None:
    grids: list[Grid] = [(4, 6), (2, 3)]
    values, locations, weights = inputs(grids)
    torch.compiler.reset()
    compiled = torch.compile(deformable_sample, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(values, locations, weights, grids=grids), deformable_sample(values, locations, weights, grids=grids)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": []}, "0 levels of values and 1 grids"),
        ({"grids": [(4, 4), (2, 2)]}, "1 levels of values and 2 grids"),
        ({"grids": [(4, 5)]}, r"values\[0\] holds 16 positions, but grids\[0\]=4x5 has 20"),
        ({"grids": [(0, 4)]}, r"grids\[0\]="),
        ({"values": [torch.zeros(2, 16, 8)]}, r"\(2, 16, 8\).*expected \(B, H\*W, heads, d\)"),
        ({"values": [torch.zeros(2, 16, 2, 4), torch.zeros(2, 4, 2, 3)], "grids": [(4, 4), (2, 2)]}, r"\(2, 4, 2, 3\)"),
        ({"locations": torch.zeros(2, 5, 2, 1, 3, 3)}, r"locations \(2, 5, 2, 1, 3, 3\)"),
        ({"locations": torch.zeros(2, 5, 3, 1, 3, 2)}, r"locations \(2, 5, 3, 1, 3, 2\).*heads=2"),
        ({"locations": torch.zeros(1, 5, 2, 1, 3, 2)}, r"locations \(1, 5, 2, 1, 3, 2\).*B=2"),
        ({"locations": torch.zeros(2, 5, 2, 2, 3, 2)}, r"locations \(2, 5, 2, 2, 3, 2\).*levels=1"),
        ({"weights": torch.zeros(2, 5, 2, 3)}, r"weights \(2, 5, 2, 3\): expected \(2, 5, 2, 1, 3\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_an_error(change: dict[str, Any], message: str) -> None:
    values, locations, weights = inputs([(4, 4)])
    given: dict[str, Any] = {"values": values, "locations": locations, "weights": weights, "grids": [(4, 4)]}
    with pytest.raises(ValueError, match=message):
        deformable_sample(**{**given, **change})


@torch.no_grad()
def test_a_token_samples_around_its_middle_in_quarters_of_its_span() -> None:
    """Not a square, and two levels under one softmax: by the loop, from the module's weights alone."""
    torch.manual_seed(0)
    (h, w), (rows, columns), heads, points = (2, 3), (5, 9), 2, 3
    module = DeformableAttention(
        8, 10, attn_dim=6, num_heads=heads, num_points=points, level_dims=(4, 6), feature_norm="none", zero_init=False
    ).double()
    for parameter in module.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    tokens = torch.randn(2, h * w, 8, dtype=torch.float64)
    levels = [torch.randn(2, rows * columns, width, dtype=torch.float64) for width in (4, 6)]
    saliency = torch.rand(2, rows * columns, dtype=torch.float64)
    values = [
        (level @ project.weight.T * saliency[..., None]).unflatten(-1, (heads, 3))
        for level, project in zip(levels, module.vr_values, strict=True)
    ]
    offsets = module.vr_offsets(tokens).reshape(2, h * w, heads, 2, points, 2)
    weights = module.vr_weights(tokens).reshape(2, h * w, heads, 2 * points).softmax(-1).unflatten(-1, (2, points))
    locations = torch.empty_like(offsets)
    for i in range(h):
        for j in range(w):
            own = offsets[:, i * w + j]
            locations[:, i * w + j, ..., 0] = (j + 0.5) / w + own[..., 0] / 4 / w
            locations[:, i * w + j, ..., 1] = (i + 0.5) / h + own[..., 1] / 4 / h
    read = naive_sample(values, locations, weights, [(rows, columns)] * 2)
    update = module(tokens, levels, token_grid=(h, w), feature_grid=(rows, columns), saliency=saliency)
    torch.testing.assert_close(update, module.vr_out(read.flatten(2)), rtol=0, atol=1e-12)


@torch.no_grad()
def test_four_heads_start_on_the_four_cells_of_a_token() -> None:
    module = DeformableAttention(8, 4, attn_dim=16, num_heads=4, num_points=1, feature_norm="none", zero_init=False)
    (h, w), feature_grid = (2, 3), (4, 6)
    features = torch.randn(1, 24, 4)
    cells = (features @ module.vr_values[0].weight.T).unflatten(1, feature_grid).unflatten(-1, (4, 4))
    seen: list[Tensor] = []
    module.vr_out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module(torch.randn(1, 6, 8), features, token_grid=(h, w), feature_grid=feature_grid)
    read = seen[0].reshape(h, w, 4, 4)
    for head, (down, right) in enumerate([(1, 1), (1, 0), (0, 0), (0, 1)]):
        torch.testing.assert_close(read[:, :, head], cells[0, down::2, right::2, head])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_module_in_half_precision_keeps_precise_places(dtype: torch.dtype) -> None:
    """On a wide grid a place in half precision would be cells away."""
    module = DeformableAttention(8, 4, attn_dim=8, num_heads=1, num_points=1, feature_norm="none", zero_init=False)
    module.vr_offsets.bias.fill_(1)  # the middle of a cell
    width = 512
    cells = torch.arange(width, dtype=torch.float32).remainder(7)[None, :, None].expand(1, -1, 4)
    features = cells.repeat(1, 2, 1).to(dtype)
    seen: list[Tensor] = []
    module = module.to(dtype)
    module.vr_values[0].weight.fill_(0.25)
    module.vr_out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module(torch.zeros(1, width // 2, 8, dtype=dtype), features, token_grid=(1, width // 2), feature_grid=(2, width))
    expected = features[:, 1:width:2, :1].expand(-1, -1, 8)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0.05)
