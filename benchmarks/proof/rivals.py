"""The rivals that need no training: pruners of vision tokens, on the arm that has been trained without compression."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember import attach_pruner
from vision_remember.adapters import PrunerHandle

from .arms import Arm
from .prompts import prompts
from .train import World

QUESTIONS = 2
"""Questions of each page that a pruner is asked: it chooses for one question at a time, so none can share a page."""
BATCH = 64
"""Pages at a time. The tokens that a pruner leaves are counted on the last of them."""


@dataclass(frozen=True)
class Rival:
    """A pruner with its options.

    Attributes:
        name: What tables call it.
        pruner: An entry of `PRUNERS`.
        options: Its options.
    """

    name: str
    pruner: str
    options: dict[str, Any] = field(default_factory=dict)


def _rivals() -> tuple[Rival, ...]:
    found = []
    for ratio in (4, 9, 16):
        keep = 1 / ratio
        found += [
            Rival(f"FastV 1/{ratio}", "fastv", {"layer": 2, "keep": keep}),
            Rival(f"FasterVLM 1/{ratio}", "faster_vlm", {"keep": keep}),
            Rival(f"VisionZip 1/{ratio}", "vision_zip", {"dominant": 0.85 * keep, "contextual": 0.15 * keep}),
            Rival(f"PruMerge+, outliers 1/{ratio}", "prumerge_plus", {"keep": keep}),
            Rival(f"random 1/{ratio}", "random", {"keep": keep}),
            Rival(f"uniform 1/{ratio}", "uniform", {"keep": keep}),
        ]
    return (
        *found,
        Rival("ToMe 1/4", "tome", {"keep": 0.25}),
        Rival("PyramidDrop", "pyramid_drop"),
        Rival("SparseVLM", "sparse_vlm"),
    )


RIVALS = _rivals()
"""At the tokens of the trained arms where they take a number; PyramidDrop and SparseVLM as they come."""


@contextmanager
def windows_as_masks(decoder: nn.Module) -> Iterator[None]:
    """Writes the window of the sliding layers into their masks, which pruners can cut: the same attention.

    Pruners refuse sliding layers, whose windows would close over the gaps in caches that they never meet here.
    """
    config: Any = decoder.config
    kinds = config.layer_types

    def narrow(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        count, device = args[0].shape[1], args[0].device
        distance = torch.arange(count, device=device)[:, None] - torch.arange(count, device=device)
        near, mask = (distance < config.sliding_window)[None, None], kwargs["attention_mask"]
        if mask is None:
            mask = (distance >= 0)[None, None]
        return args, {**kwargs, "attention_mask": mask & near}

    layers: Any = decoder.layers
    handles = [
        layer.register_forward_pre_hook(narrow, with_kwargs=True)
        for layer, kind in zip(layers, kinds, strict=True)
        if kind == "sliding_attention"
    ]
    config.layer_types = ["full_attention"] * len(kinds)
    try:
        yield
    finally:
        config.layer_types = kinds
        for handle in handles:
            handle.remove()


@contextmanager
def pruning(arm: Arm, rival: Rival) -> Iterator[PrunerHandle]:
    """Inside the ``with`` the arm's model is pruned."""
    with windows_as_masks(arm.model.model.language_model):
        handle = attach_pruner(arm.model, rival.pruner, **rival.options)
        try:
            yield handle
        finally:
            handle.detach()


@torch.no_grad()
def asked_alone(arm: Arm, world: World) -> dict[str, float]:
    """Accuracy by task of the model's own forward, question by question, on the first questions of the test pages."""
    data, device = world.test, world.level.device
    right, asked = torch.zeros(len(world.tasks)), torch.zeros(len(world.tasks))
    for question in range(QUESTIONS):
        for pages in torch.arange(len(data.pages)).split(BATCH):
            pages = pages[(data.pages.streams.branch[pages] == question).any(1)]
            if not len(pages):
                continue
            inputs, truth = prompts(data.pages, arm.tokens, pages, question, device)
            found = arm.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
            task = data.pages.tasks[pages]
            right.index_add_(0, task, ((found == truth) & (truth >= 0)).float().cpu())
            asked.index_add_(0, task, (truth >= 0).float().cpu())
    return {name: round((right[i] / asked[i]).item(), 5) for i, name in enumerate(world.tasks) if asked[i]}


@torch.no_grad()
def pruned(arm: Arm, world: World) -> dict[str, Any]:
    """What each rival makes of a trained arm.

    Args:
        arm: Trained, without compression.
        world: What all runs share.

    Returns:
        By rival: "test", accuracies by task, and "tokens", the mean over layers of how many were left on the last
        pages. "none" is the arm itself, asked in the same way.
    """
    found: dict[str, Any] = {"none": {"test": asked_alone(arm, world)}}
    for rival in RIVALS:
        with pruning(arm, rival) as handle:
            test = asked_alone(arm, world)
            left = handle.tokens_per_layer.float().mean().item()
            found[rival.name] = {"test": test, "tokens": round(left, 2)}
    return found
