"""What activation checkpointing of a decoder layer means for the block in front of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

HOOKS_STAY_OUTSIDE = "__init_subclass__" in GradientCheckpointingLayer.__dict__
"""Since transformers 5.23 a layer checkpoints its forward, and its hooks run outside. Before, they ran inside, and
again in the backward pass."""


def refuse_reentrant(layers: Iterable[nn.Module]) -> None:
    """Raises RuntimeError if a layer's re-entrant checkpoint would lose gradients of the encoder's features.

    Such a checkpoint passes gradients through positional arguments only, and inside it the features come by keyword.
    """
    if HOOKS_STAY_OUTSIDE:
        return
    for layer in layers:
        checkpoint: Any = getattr(layer, "_gradient_checkpointing_func", None)
        active = getattr(layer, "gradient_checkpointing", False) and layer.training
        if active and getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
            raise RuntimeError(
                "before transformers 5.23, re-entrant activation checkpointing would lose gradients of an encoder that "
                "trains: enable it with use_reentrant=False, freeze the encoder, or update transformers"
            )
