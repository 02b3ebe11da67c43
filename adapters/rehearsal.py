"""What an adapter folder asks for is tried on the meta device first: nothing is allocated, and nothing is touched.

Folders come from strangers. A description that makes no module, or one of other shapes than the weights beside it, has
to fail before the model is changed, and before a size that someone wrote into a file is allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.adapters.attach import new_block, plan
from vision_remember.adapters.checkpoint import SavedAdapter, check_base, check_weights, describe_projector
from vision_remember.adapters.compress import new_projector
from vision_remember.adapters.resolve import HostParts, resolve
from vision_remember.adapters.spec import MLLMSpec
from vision_remember.projectors import Projector

_OF_A_WRONG_VALUE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError, RuntimeError),
    TypeError,
)
# What compress_projector takes beside the projector's own options.
_NO_OPTIONS = ("model", "processor", "spec")
# Layers of which each has a tensor of its own: even on the meta device, a million of them takes hours.
_DEPTHS = ("depth", "mlp_depth", "num_layers")


def rehearse(model: nn.Module, saved: SavedAdapter, spec: MLLMSpec | None) -> HostParts:
    """Builds what an adapter describes without storage, and compares it with the adapter's weights.

    Args:
        model: what the adapter is meant for.
        saved: the adapter.
        spec: the host's names; None for those that the model itself is known by.

    Returns:
        The host's parts.

    Raises:
        ValueError: the description does not fit the model, or the weights do not fit the description.
    """
    with wrong_values():
        parts = resolve(model, spec)
        check_base(saved, parts)
        with torch.device("meta"):
            projector = parts.projector
            if saved.projector is not None and saved.projector != describe_projector(projector):
                projector = _projector(parts, saved.projector, saved.tensors)
            modules: dict[str, nn.Module] = {"projector": projector} if isinstance(projector, Projector) else {}
            config, tap = plan(dataclasses.replace(parts, projector=projector), saved.config)
            for index in config.layers:
                modules[f"vision_remember.{index}"] = new_block(parts, config, tap)
        check_weights(saved, modules)
    return parts


def _projector(parts: HostParts, described: dict[str, Any], tensors: dict[str, Tensor]) -> Projector:
    options = {name: value for name, value in described.items() if name != "name"}
    misplaced = [name for name in options if name in _NO_OPTIONS]
    if not isinstance(described.get("name"), str) or misplaced:
        raise ValueError(f"projector={described!r}: expected the name of a projector and its options")
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for name, value in options.items():
        bound = len(tensors) if name in _DEPTHS else largest
        if isinstance(value, int) and value > max(bound, 1) and name != "ratio":
            raise ValueError(f"projector option {name}={value}: more than the adapter's weights can be those of")
    return new_projector(parts, described["name"], **options)


@contextmanager
def wrong_values() -> Iterator[None]:
    """Whatever a value of a wrong kind sets off inside becomes a ValueError: nothing in here changes anything."""
    try:
        yield
    except _OF_A_WRONG_VALUE as error:
        raise ValueError(f"the adapter's description fits no model: {type(error).__name__}: {error}") from error
