"""Tensors that FSDP2 spreads over processes. Each function here is for all processes to call together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def class_name(model: nn.Module) -> str:
    """The name of the model's class; ``fully_shard`` puts one of its own in front."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule)).__name__


def whole(tensor: Tensor) -> Tensor:
    """A tensor of any shape, put together from its shards; a tensor without shards as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, values: Tensor) -> None:
    """Copies ``values``, which are whole, into ``target`` of the same shape, whole or in shards."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            values = distribute_tensor(values.to(target.device, target.dtype), target.device_mesh, target.placements)
        target.copy_(values)
