"""Two blocks as a host runs them, against their matrix products alone; on a GPU a training step of them too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed.measure import Plan, Result, measure
from vision_remember import VisionRemember
from vision_remember.memory import Span, VisionMemory
from vision_remember.remember import lay_weights_side_by_side, prepare_together, read_by_kernels

_DECODERS = {"Qwen2-0.5B": 896, "Qwen2-1.5B": 1536, "Qwen2-7B": 3584}
_LEVEL, _TEXT = 1024, 50


def run(plan: Plan) -> list[Result]:
    """At the widths of three decoders, CLIP-L tiles of 24x24 cells under 12x12 tokens; one tile, on a GPU five too."""
    decoders = {"tiny": 32} if plan.small else _DECODERS
    level = 32 if plan.small else _LEVEL
    results = []
    for name, width in decoders.items():
        for tiles in (1, 5) if plan.device == "cuda" else (1,):
            case = name if tiles == 1 else f"{name} x{tiles}"
            results += measure(plan, case, candidates(width, level, plan, tiles))
            if plan.device == "cuda":
                results += measure(plan, f"{case} f+b", candidates(width, level, plan, tiles, learning=True))
    return results


def candidates(
    width: int, level: int, plan: Plan, tiles: int = 1, *, side: int = 12, learning: bool = False
) -> dict[str, Callable[[], Any]]:
    """Both blocks' products, the blocks, the blocks with absorbed projections, other interactions.

    Args:
        width: D.
        level: c, channels of each of three levels.
        plan: of which the device counts.
        tiles: images in the one sequence.
        side: tokens per side of a tile, over twice as many cells.
        learning: forward and backward, with gradients of the blocks and the tokens but not of the cells, which a frozen
            encoder made.
    """
    device, dtype = plan.device, plan.dtype
    generator = torch.Generator(device).manual_seed(0)
    tokens, cells = side**2, 4 * side**2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator, dtype=dtype)

    # With the CLS token in front, which is cut off as the tap does it.
    levels = tuple(draw(tiles, cells + 1, level).narrow(1, 1, cells) for _ in range(3))
    grids = (2 * side, 2 * side), (side, side)
    memory = VisionMemory(levels, draw(tiles, cells).sigmoid(), *grids, (Span(range(tiles * tokens), range(tiles)),))
    hidden = draw(1, tiles * tokens + _TEXT, width).requires_grad_(learning)
    places = torch.zeros(1, hidden.shape[1], dtype=torch.bool, device=device)
    places[:, _TEXT // 2 : _TEXT // 2 + tiles * tokens] = True

    def remembering(*, ahead: bool = True, **options: Any) -> Callable[[], Any]:
        blocks = [VisionRemember(width, 3 * level, num_levels=3, **options).to(device, dtype) for _ in range(2)]
        lay_weights_side_by_side(blocks)
        trained = [hidden, *(parameter for block in blocks for parameter in block.parameters())]

        def forward() -> list[Tensor]:
            recall, state = memory.recall_images([0], places, by_kernel=read_by_kernels(blocks, hidden.device)), hidden
            if ahead:
                recall = recall.prepared(blocks, prepare_together)
            for block in blocks:
                state = recall.through(block, state)
            return [state]

        return _timed(forward, trained, learning)

    found = {
        "their products": _products(
            width, 3 * level, draw(tiles * tokens, width), draw(tiles * cells, 3 * level), learning
        ),
        "blocks": remembering(),
        "blocks, nothing shared": remembering(ahead=False),
        "blocks, absorbed": remembering(absorb=True),
        "blocks, deformable": remembering(interaction="deformable"),
        "blocks, global": remembering(interaction="global"),
    }
    if device == "cuda":
        found["blocks, without kernels of ours"] = remembering(backend="windowed")
    return found


def _products(width: int, joined: int, tokens: Tensor, features: Tensor, learning: bool) -> Callable[[], Any]:
    """Keys, values, queries and outputs of two blocks, from weights like theirs."""
    block = VisionRemember(width, joined, num_levels=3).to(features.device, features.dtype)
    reader = block.interaction
    weights = [
        [module.weight.detach().clone().requires_grad_(learning) for module in modules]  # type: ignore[union-attr]
        for modules in 2 * [(reader.vr_key, reader.vr_value, reader.vr_query, reader.vr_out)]
    ]
    tokens.requires_grad_(learning)

    def forward() -> list[Tensor]:
        made = []
        for key, value, query, out in weights:
            made += [F.linear(features, key), F.linear(features, value), F.linear(F.linear(tokens, query), out)]
        return made

    return _timed(forward, [tokens, *(weight for block_weights in weights for weight in block_weights)], learning)


def _timed(forward: Callable[[], list[Tensor]], trained: list[Tensor], learning: bool) -> Callable[[], Any]:
    """The pass without gradients; ``learning``, with those of what takes part of ``trained``."""
    if not learning:
        return torch.no_grad()(forward)
    # Gradients that are there already, so that nothing but the pass's own is timed.
    given = [torch.ones_like(result) for result in forward()]
    found = torch.autograd.grad(forward(), trained, given, allow_unused=True)
    used = [x for x, gradient in zip(trained, found, strict=True) if gradient is not None]
    return lambda: torch.autograd.grad(forward(), used, given)
