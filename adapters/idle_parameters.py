"""Parameters that have nothing to do in a training step without images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vision_remember.memory import Recall, VisionMemory


def recall_nothing(module: nn.Module, level_dims: Sequence[int], parameters: Iterable[nn.Parameter]) -> Recall:
    """A recall without any image, which gives blocks gradients of zero; and ``parameters`` too, on several processes.

    Processes that train together exchange gradients of the same parameters in every step: one whose batch is text only
    would have none for the projector, and the others would wait for it. A single process leaves these alone: its
    optimiser skips what has no gradient.

    Args:
        module: of the host, for device and dtype.
        level_dims: c of each level.
        parameters: those that only images reach.
    """
    like = next(p for p in module.parameters() if p.is_floating_point())
    recall = VisionMemory.nothing(level_dims, like)
    if not (dist.is_available() and dist.is_initialized()):
        return recall
    ((memory, layout),) = recall.parts
    first, *others = memory.levels
    first = _joined_to(first, parameters)
    return Recall(((replace(memory, levels=(first, *others)), layout),))


def _joined_to(features: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """``features``, of any shape, unchanged; their graph reaches the parameters, with gradients of zero."""
    for parameter in parameters:
        # One that is in shards here belongs to a module with collectives of its own, which only a call would run.
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            features = features + parameter.flatten()[:0].sum().to(features)
    return features
