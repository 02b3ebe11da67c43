"""Looks inside a trained arm: what the encoder finds salient, and where a vision token re-reads the page."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_remember import MultiLevelTap

from .arms import BLOCK_LAYERS, LEVELS, Arm
from .pages import Pages
from .train import question_logits


@dataclass(frozen=True)
class Look:
    """One page through the Vision Remember arm.

    Attributes:
        saliency: (12, 12), the factor on each cell's values.
        token_grid: (h, w) of the vision tokens.
        attention: Per decoder layer with a block, (heads, h * w, 12, 12): each token's weights over the page.
    """

    saliency: Tensor
    token_grid: tuple[int, int]
    attention: dict[int, Tensor]


@torch.no_grad()
def look_at(arm: Arm, page: Pages) -> Look:
    """Runs a page through an arm with Vision Remember and keeps what its blocks look at."""
    if arm.handle is None:
        raise ValueError("this arm has no Vision Remember")
    config = arm.handle.config
    tokens: dict[int, Tensor] = {}
    hooks = []
    blocks = {layer: arm.model.model.language_model.layers[layer].vision_remember for layer in BLOCK_LAYERS}
    for layer, block in blocks.items():

        def keep(norm: torch.nn.Module, args: tuple[Tensor, ...], normalised: Tensor, layer: int = layer) -> None:
            tokens[layer] = normalised

        hooks.append(block.norm.register_forward_hook(keep))
    tap = MultiLevelTap(
        arm.model.model.vision_tower, LEVELS, variant=config.saliency_variant, center=config.saliency_center
    )
    with tap.capture() as captured:
        question_logits(arm, page, torch.zeros(1, 1, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    if captured.saliency is None:
        raise ValueError("the encoder gave no saliency map")

    side = int(arm.vision_tokens**0.5)
    attention = {
        layer: block.interaction.attention_weights(
            tokens[layer], captured.joined(), token_grid=(side, side), feature_grid=captured.grid
        )[0].unflatten(-1, captured.grid)
        for layer, block in blocks.items()
    }
    return Look(captured.saliency[0].view(captured.grid), (side, side), attention)


@torch.no_grad()
def prefill_seconds(arms: Mapping[str, Arm], pages: Pages, repeats: int) -> dict[str, float]:
    """Median time of a forward pass over a batch of pages with one question each; the arms take turns."""
    columns = torch.zeros(len(pages), 1, dtype=torch.long)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            question_logits(arm, pages, columns)
            if repeat > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
