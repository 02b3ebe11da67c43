"""Absorbed projections against projecting every cell and attending to that: the core alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed.measure import Plan, Result, measure
from vision_remember.interactions.absorbed import absorbed_attention
from vision_remember.ops.windowed import attend_regions


def run(plan: Plan) -> list[Result]:
    """One CLIP-L tile; one query over four cells, and four over sixteen."""
    results = []
    for heads, width in ((2, 4),) if plan.small else ((14, 64), (16, 64), (8, 128)):
        for queries in (1, 4):
            results += _case(plan, heads, width, queries, 4 if plan.small else 144, 24 if plan.small else 3072)
    return results


@torch.no_grad()
def _case(plan: Plan, heads: int, width: int, queries: int, tokens: int, channels: int) -> list[Result]:
    generator = torch.Generator(plan.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=plan.device, generator=generator, dtype=plan.dtype)

    regions, cells = tokens // queries, 4 * queries
    query = draw(regions, queries, heads, width).transpose(1, 2)
    features, saliency = draw(regions, cells, channels), draw(regions, cells).sigmoid()
    key, value = (draw(heads * width, channels) / channels**0.5 for _ in range(2))
    levels, bias = features.split(channels // 3, dim=-1), draw(heads, queries, cells)

    def heads_of(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, width)).transpose(1, 2)

    def projecting() -> Tensor:
        values = F.linear(features, value) * saliency.unsqueeze(-1)
        return attend_regions(query, heads_of(F.linear(features, key)), heads_of(values), bias)

    def absorbing() -> Tensor:
        return absorbed_attention(query, levels, key, value, saliency=saliency, bias=bias)

    close = 1e-3 if plan.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(absorbing(), projecting(), rtol=close, atol=close)
    case = f"{heads} heads of {width}, {queries} queries"
    return measure(plan, case, {"projecting": projecting, "absorbing": absorbing})
