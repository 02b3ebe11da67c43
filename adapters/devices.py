"""Layers that accelerate places: on several devices, or with weights that it fetches for each call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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


def fetched(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict, with the weights that accelerate has offloaded."""
    state: dict[str, Tensor] = module.state_dict()
    for path, part in module.named_modules():
        for hook in _hooks(part):
            if getattr(hook, "offload", False):
                own = [*part.named_parameters(recurse=hook.place_submodules), *part.named_buffers(recurse=False)]
                for name in (name for name, tensor in own if tensor.device.type == "meta"):
                    state[f"{path}.{name}".lstrip(".")] = hook.weights_map[name]
    return state


def all_on_meta() -> bool:
    """Whether new tensors are made on the meta device."""
    # Asked of a tensor: torch 2.6 does not tell the device of a context manager.
    return torch.empty(0).device.type == "meta"


def refuse_absent(weights: Mapping[str, Tensor], of: str, advice: str) -> None:
    """Raises ValueError for weights that are on the meta device, unless that is where all is meant to be."""
    absent = [name for name, tensor in weights.items() if tensor.device.type == "meta"]
    if absent and not all_on_meta():
        raise ValueError(f"{len(absent)} weights of {of} are on the meta device ({absent[0]}, ...): {advice}")


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module."""
    hook: Any = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def _has_device(hook: Any) -> bool:
    return getattr(hook, "execution_device", None) is not None
