"""Keys and values for several layers by one product: their weights stand side by side in memory.

They stay parameters of their modules, each a view of a common storage, as those of ``torch.nn.LSTM`` are. No copy
can grow old: what writes into a parameter writes into the bank, and what gives it a storage of its own, ``module.to``
or a deep copy, dissolves the bank. Then, and in compiled code, every weight has its own product again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def save_apart(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook on a state dict: a weight that lies in a bank is handed out as a copy of its own.

    What writes files, safetensors above all, takes tensors of one storage for one and the same.
    """
    weight = state.get(f"{prefix}weight")
    if not isinstance(weight, Tensor) or isinstance(weight, nn.Parameter):
        return
    if weight.untyped_storage().nbytes() > weight.nbytes:
        state[f"{prefix}weight"] = weight.clone()


def lay_side_by_side(weights: Sequence[nn.Parameter]) -> None:
    """Moves matrices of one width into a common storage, one after the other. Their values stay as they are.

    For parameters that nothing else holds a view of yet. Those of several dtypes, devices or widths stay as they are.
    """
    if len({(weight.dtype, weight.device, weight.shape[1:]) for weight in weights}) != 1:
        return
    bank = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, bank.split([len(weight) for weight in weights]), strict=True):
        weight.data = part


def side_by_side(weights: Sequence[Tensor]) -> Tensor | None:
    """The matrices as one, (sum of rows, C), without a copy; None if they do not stand one after the other."""
    first = weights[0]
    if torch.compiler.is_compiling() or not isinstance(first, nn.Parameter):
        return None
    storage, offset = first.untyped_storage(), first.storage_offset()
    for weight in weights:
        here = weight.is_contiguous() and weight.storage_offset() == offset and weight.dtype == first.dtype
        if not here or weight.shape[1:] != first.shape[1:] or weight.untyped_storage()._cdata != storage._cdata:
            return None
        offset += weight.numel()
    rows = sum(weight.shape[0] for weight in weights)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())


def keys_and_values(
    features: Tensor, bank: Tensor, saliency: Tensor | None, heads: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of cells for every layer of the bank.

    Args:
        features: (R, n, C).
        bank: (layers * 2 * width, C): a layer's key weights, its value weights, and so on.
        saliency: (R, n), multiplies the values.
        heads: of each layer.

    Returns:
        For each layer (R, heads, n, d) twice.
    """
    made = F.linear(features, bank).unflatten(-1, (len(heads), 2, -1))
    keys, values = made.select(3, 0), made.select(3, 1)
    if saliency is not None:
        values = values * saliency.unsqueeze(-1).unsqueeze(-1).to(values.dtype)
    return [
        (_heads(keys.select(2, layer), count), _heads(values.select(2, layer), count))
        for layer, count in enumerate(heads)
    ]


def _heads(x: Tensor, heads: int) -> Tensor:
    """(R, n, width) -> (R, heads, n, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
