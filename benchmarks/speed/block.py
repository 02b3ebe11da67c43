"""Two blocks as a host runs them, against their matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed.measure import Plan, Result, measure
from vision_remember import VisionRemember
from vision_remember.memory import Span, VisionMemory
from vision_remember.remember import lay_weights_side_by_side, prepare_together

_DECODERS = {"Qwen2-0.5B": 896, "Qwen2-1.5B": 1536, "Qwen2-7B": 3584}
_LEVEL, _TEXT = 1024, 50


def run(plan: Plan) -> list[Result]:
    """At the widths of three decoders, one CLIP-L tile of 24x24 cells under 12x12 tokens."""
    decoders = {"tiny": 32} if plan.small else _DECODERS
    results = []
    for name, width in decoders.items():
        results += measure(plan, name, candidates(width, 32 if plan.small else _LEVEL, plan.device))
    return results


def candidates(width: int, level: int, device: str, side: int = 12) -> dict[str, Callable[[], Any]]:
    """Both blocks' products, the blocks, the blocks with absorbed projections, other interactions."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, cells = side**2, 4 * side**2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    # With the CLS token in front, which is cut off as the tap does it.
    levels = tuple(draw(1, cells + 1, level).narrow(1, 1, cells) for _ in range(3))
    grids = (2 * side, 2 * side), (side, side)
    memory = VisionMemory(levels, draw(1, cells).sigmoid(), *grids, (Span(range(tokens), range(1)),))
    hidden, places = draw(1, tokens + _TEXT, width), torch.zeros(1, tokens + _TEXT, dtype=torch.bool, device=device)
    places[:, _TEXT // 2 : _TEXT // 2 + tokens] = True

    def remembering(*, ahead: bool = True, **options: Any) -> Callable[[], Tensor]:
        blocks = [VisionRemember(width, 3 * level, num_levels=3, **options).to(device).eval() for _ in range(2)]
        lay_weights_side_by_side(blocks)

        @torch.no_grad()
        def forward() -> Tensor:
            recall, state = memory.recall_images([0], places), hidden
            if ahead:
                recall = recall.prepared(blocks, prepare_together)
            for block in blocks:
                state = recall.through(block, state)
            return state

        return forward

    return {
        "their products": _products(width, 3 * level, cells, draw(1, cells, 3 * level), draw(1, tokens, width)),
        "blocks": remembering(),
        "blocks, nothing shared": remembering(ahead=False),
        "blocks, absorbed": remembering(absorb=True),
        "blocks, deformable": remembering(interaction="deformable"),
        "blocks, global": remembering(interaction="global"),
    }


def _products(width: int, joined: int, cells: int, features: Tensor, tokens: Tensor) -> Callable[[], Any]:
    """Keys, values, queries and outputs of two blocks, from weights like theirs."""
    block = VisionRemember(width, joined, num_levels=3).to(features.device)
    weights = [
        [module.weight.detach().clone() for module in (reader.vr_key, reader.vr_value, reader.vr_query, reader.vr_out)]  # type: ignore[union-attr]
        for reader in (block.interaction, block.interaction)
    ]

    @torch.no_grad()
    def forward() -> None:
        for key, value, query, out in weights:
            F.linear(features, key)
            F.linear(features, value)
            F.linear(F.linear(tokens, query), out)

    return forward
