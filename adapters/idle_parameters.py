"""Parameters that have nothing to do in a step without images, in training on several processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def join_idle_parameters(features: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """``features`` as they are, through which the modules' trainable parameters get gradients of zero.

    Processes exchange gradients of the same parameters in every step: one whose batch is text only would have none for
    the projector, and the others would wait for it. A single process is left alone: its optimiser skips what has no
    gradient.

    Args:
        features: of no image, any shape.
        modules: with parameters that only images reach.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return features
    for module in modules:
        for parameter in module.parameters():
            # One that is in shards here belongs to a module with collectives of its own, which only a call would run.
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                features = features + parameter.flatten()[:0].sum().to(features)
    return features
