"""The attention core: local attention's forms against attention that sees all cells."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed.measure import Plan, Result, measure
from vision_remember import local_attention
from vision_remember.ops.windowed import attend_regions

_HEADS, _WIDTH = 14, 64
_SIDES, _SMALL = (12, 24, 36, 48), (4, 6)
_DENSE_UP_TO = 36 * 36  # the mask of 2304 tokens over 9216 cells alone would take a gigabyte with its scores


def run(plan: Plan) -> list[Result]:
    """Grids of 12 to 48 tokens a side over twice as many cells, 1, 5 and 10 tiles, forward and backward."""
    results = []
    for side in _SMALL if plan.small else _SIDES:
        for learning in (False, True):
            results += _case(plan, side, 1, learning)
    for tiles in (2,) if plan.small else (5, 10):
        results += _case(plan, _SMALL[0] if plan.small else _SIDES[0], tiles, False)
    if plan.device == "cuda" and not plan.small:  # a batch that fills a GPU
        for learning in (False, True):
            results += _case(plan, _SIDES[0], 40, learning)
    return results


def _case(plan: Plan, side: int, tiles: int, learning: bool) -> list[Result]:
    token_grid, key_grid = (side, side), (2 * side, 2 * side)
    generator = torch.Generator(plan.device).manual_seed(0)

    def draw(cells: int) -> Tensor:
        # Heads last but one in memory, as projections make them.
        x = torch.randn(tiles, cells, _HEADS, _WIDTH, device=plan.device, generator=generator, dtype=plan.dtype)
        return x.transpose(1, 2).requires_grad_(learning)

    query, key, value = draw(side**2), draw(4 * side**2), draw(4 * side**2)
    forms = _forms(query, key, value, token_grid, key_grid)
    candidates = {name: _stepping(form, (query, key, value), learning) for name, form in forms.items()}
    if not learning:
        candidates = {
            "regions": candidates.pop("regions"),
            "copy of q, k, v": _copying(query, key, value),
            **candidates,
        }
    case = f"{side}/{2 * side}" + (f" x{tiles}" if tiles > 1 else "") + (" f+b" if learning else "")
    repeats = plan.repeats if side < 36 else max(3, plan.repeats // 2)
    return measure(plan, case, candidates, repeats=repeats)


def _forms(
    query: Tensor, key: Tensor, value: Tensor, token_grid: tuple[int, int], key_grid: tuple[int, int]
) -> dict[str, Callable[[], Tensor]]:
    tiles, heads, tokens, width = query.shape
    grids: dict[str, Any] = {"query_grid": token_grid, "key_grid": key_grid}
    bias = torch.zeros(heads, 1, 4, device=query.device, dtype=query.dtype, requires_grad=query.requires_grad)

    def ordered(x: Tensor, cells: int) -> Tensor:
        """Taken for standing in the order of regions, as prepared cells do: (R, heads, n, d)."""
        return x.transpose(1, 2).reshape(tiles * tokens, cells, heads, width).transpose(1, 2)

    def regions(bias: Tensor | None = None) -> Tensor:
        return attend_regions(ordered(query, 1), ordered(key, 4), ordered(value, 4), bias)

    def larger_regions() -> Tensor:
        parts = [
            x.transpose(1, 2).reshape(tiles * tokens // 4, -1, heads, width).transpose(1, 2)
            for x in (query, key, value)
        ]
        return attend_regions(*parts)

    forms: dict[str, Callable[[], Tensor]] = {
        "regions": regions,
        "regions, with bias": lambda: regions(bias),
        "regions of 4 queries": larger_regions,
        "from the raster": lambda: local_attention(query, key, value, **grids),
        "global SDPA": lambda: F.scaled_dot_product_attention(query, key, value),
        "unfold": lambda: _unfolded(query, key, value, token_grid, key_grid),
    }
    if tiles == 1 and tokens <= _DENSE_UP_TO:
        mask = _mask(token_grid, key_grid, query.device)
        forms["masked SDPA"] = lambda: F.scaled_dot_product_attention(query, key, value, mask)
    if query.is_cuda:
        forms["from the raster, with bias"] = lambda: local_attention(query, key, value, **grids, bias=bias)
        forms["FlexAttention"] = _flex(query, key, value, token_grid, key_grid)
    return forms


def _stepping(form: Callable[[], Tensor], inputs: tuple[Tensor, ...], learning: bool) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return form()

    def step() -> None:
        for x in inputs:
            x.grad = None
        form().sum().backward()

    return step if learning else forward


def _copying(*tensors: Tensor) -> Callable[[], Any]:
    return lambda: [x.detach().clone() for x in tensors]


def _unfolded(query: Tensor, key: Tensor, value: Tensor, token_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Regions by ``F.unfold``: the form that many repositories have."""
    tiles, heads, _, width = key.shape

    def windows(x: Tensor) -> Tensor:
        maps = x.transpose(2, 3).reshape(tiles, heads * width, *grid)
        return F.unfold(maps, 2, stride=2).reshape(tiles, heads, width, 4, -1).permute(0, 1, 4, 3, 2)

    logits = (query.unsqueeze(3) * windows(key)).sum(-1) / math.sqrt(width)
    return (logits.softmax(-1).unsqueeze(-1) * windows(value)).sum(3)


def _region_of(position: Tensor, columns: int, by: int) -> Tensor:
    return (position // columns // by) * (columns // by) + position % columns // by


def _mask(token_grid: tuple[int, int], key_grid: tuple[int, int], device: torch.device) -> Tensor:
    tokens = torch.arange(math.prod(token_grid), device=device)
    cells = _region_of(torch.arange(math.prod(key_grid), device=device), key_grid[1], 2)
    return tokens[:, None] == cells[None]


def _flex(
    query: Tensor, key: Tensor, value: Tensor, token_grid: tuple[int, int], key_grid: tuple[int, int]
) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def inside(batch: Tensor, head: Tensor, token: Tensor, cell: Tensor) -> Tensor:
        return token == _region_of(cell, key_grid[1], 2)

    mask = create_block_mask(inside, None, None, math.prod(token_grid), math.prod(key_grid), device=str(query.device))
    compiled: Any = torch.compile(flex_attention)
    return lambda: compiled(query, key, value, block_mask=mask)
