"""Whether a call is to give more than numbers and gradients: transforms of torch.func, and forward derivatives."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work; compiled code, which may not ask, is taken for none."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a tensor carries a forward derivative; in compiled code none does."""
    # Outside of a dual level none can: a pass that asks about all parameters of a block should not have to walk them.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors if x is not None)
