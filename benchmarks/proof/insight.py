"""Looks inside a trained arm: who looks at vision tokens, and what vision tokens still know, layer by layer."""

from __future__ import annotations

from typing import Any

import torch

from vision_remember import attach_vision_remember, attention_density, forgetting_curve

from .arms import Arm
from .prompts import prompts
from .train import World

PAGES = 96


@torch.no_grad()
def look_inside(arm: Arm, world: World) -> dict[str, Any]:
    """Attention density of vision tokens by layer and, with Vision Remember, the forgetting curve.

    The probe reads from a vision token which label the first of its cells has: what pooling makes hard to tell.
    """
    level = world.level
    step = max(1, len(world.test.pages) // PAGES)
    pages = torch.arange(0, len(world.test.pages), step)[:PAGES]
    inputs, _ = prompts(world.test.pages, arm.tokens, pages, 0, level.device)
    arm.model.eval()
    density = attention_density(arm.model, inputs).per_layer()
    found: dict[str, Any] = {"density": [round(value, 4) for value in density.tolist()]}
    handle = arm.handle
    if handle is None and arm.spec.projector is not None and arm.spec.control is None:
        handle = attach_vision_remember(arm.model, layers=[1])  # an identity: what the probe needs to run
    if handle is None:
        return found
    cells, labels = arm.grid[0] // int(arm.tokens**0.5), world.test.pages.labels[pages].long()
    first = labels[:, ::cells, ::cells].flatten()
    curve = forgetting_curve(arm.model, inputs, target=first)
    if arm.handle is None:
        handle.detach()
    commonest = (first == first.mode().values).float().mean().item()
    found["forgetting"] = {
        "remembered": [round(value, 4) for value in curve.remembered.tolist()],
        "plain": [round(value, 4) for value in curve.plain.tolist()],
        "commonest": round(commonest, 4),
    }
    return found
