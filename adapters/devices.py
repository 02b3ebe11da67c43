"""Layers that accelerate places: on several devices, or with weights that it fetches for each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def execution_device(layer: nn.Module) -> torch.device | None:
    """Where accelerate computes a layer of a device map; None for other layers.

    It moves the inputs when the layer's forward begins, and that is after the layer's hooks.
    """
    return next((torch.device(hook.execution_device) for hook in _hooks(layer) if _has_device(hook)), None)


def offloaded_placement(layer: nn.Module, base: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype for a block in front of a layer whose weights are offloaded; None for other layers.

    The block is not offloaded itself: it stays where the layer is computed.
    """
    hooks = [hook for module in layer.modules() for hook in _hooks(module) if getattr(hook, "offload", False)]
    if not hooks:
        return None
    floating = (p for p in (*layer.parameters(), *base.parameters()) if p.is_floating_point())
    return torch.device(hooks[0].execution_device), next(p.dtype for p in floating if p.dtype.itemsize >= 2)


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module."""
    hook: Any = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def _has_device(hook: Any) -> bool:
    return getattr(hook, "execution_device", None) is not None
