"""Rows of a decoder's attention maps, while it runs on fused kernels.

transformers' decoders hand queries and keys, rotated and normalised as they like, to an attention function that their
configuration names. For one forward pass it names ours, which runs the fused kernel and besides recomputes the few rows
that are asked for, by the model's own eager function: its soft cap, its grouped heads and its scale apply as they are.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

Read = Callable[[int, Tensor, Tensor], None]
"""Called with a layer's number, weights (B, heads, Q, S) and what each query may look at, (B, Q, S) bool."""

_IMPLEMENTATION = "_attn_implementation_internal"
_ONLY_EAGER = ("softcap", "s_aux")
"""Arguments of an attention function that the kernels of torch know nothing of."""
_ONE_AT_A_TIME = threading.RLock()
"""Of a configuration that several threads change, none would know how it was before."""


@contextmanager
def attention_rows(decoder: nn.Module, layers: nn.ModuleList, positions: Tensor, read: Read) -> Iterator[None]:
    """Inside the ``with``, forward passes of this thread call ``read`` for every decoder layer that attends.

    The pass runs on torch's fused kernel, on the model's own eager function where it ran on that or has what the kernel
    lacks (a soft cap). Afterwards the model and transformers are as before, whatever happened inside. Another thread
    that runs the same model meanwhile gets right results, with eager attention or SDPA, and is not read; one that wants
    to read waits.

    Args:
        decoder: the language model.
        layers: its layers.
        positions: (B, Q), the query positions; a sample with fewer may repeat some.
        read: receives the rows.
    """
    name = f"vision_remember_rows_{threading.get_ident()}_{id(read)}"
    thread = threading.get_ident()
    owners = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
    configs = {id(c): c for m in decoder.modules() if hasattr(c := getattr(m, "config", None), _IMPLEMENTATION)}
    before: dict[int, str] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if module in owners and threading.get_ident() == thread:
            index = owners[module]
            rows, mask, visible = _selected(index, query, key, attention_mask, positions.to(query.device))
            _, weights = eager_function(module)(module, rows, key, value, mask, **{**options, "dropout": 0.0})
            read(index, weights, visible)
        asked = before[id(module.config)]
        if asked == "eager" or any(options.get(option) is not None for option in _ONLY_EAGER):
            additive = None if attention_mask is None else _additive(attention_mask, query.dtype)
            return eager_function(module)(module, query, key, value, additive, **options)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)

    with _ONE_AT_A_TIME:
        before.update((key, getattr(config, _IMPLEMENTATION)) for key, config in configs.items())
        try:
            AttentionInterface.register(name, attention)
            AttentionMaskInterface.register(name, _whole_mask)
            for config in configs.values():
                setattr(config, _IMPLEMENTATION, name)
            yield
        finally:
            for key, config in configs.items():
                setattr(config, _IMPLEMENTATION, before[key])
            for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
                table._global_mapping.pop(name, None)


def eager_function(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the model that an attention module belongs to.

    Raises:
        ValueError: its source file has none.
    """
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if inspect.isfunction(function):
            return function
    raise ValueError(f"{type(module).__name__} has no eager_attention_forward beside it to recompute attention with")


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A mask to add to logits, (B, 1, S, S), never left out: the rows need it. Any attention function takes it."""
    return eager_mask(*args, **{**kwargs, "allow_is_bidirectional_skip": False})


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as something to add to logits."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, torch.finfo(dtype).min)


def _selected(
    layer: int, query: Tensor, key: Tensor, mask: Tensor | None, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, heads, Q, d), an additive mask (B, 1, Q, S) and a boolean one (B, Q, S) at the positions."""
    length, width = query.shape[2], key.shape[2]
    if length != width or len(query) != len(positions):
        raise ValueError(
            f"decoder layer {layer} attends from {length} to {width} positions in {len(query)} sequences: expected one "
            f"pass over {len(positions)} whole sequences, without a cache of earlier tokens"
        )
    if mask is None:
        mask = torch.ones(length, width, dtype=torch.bool, device=query.device).tril()[None, None]
    mask = mask.expand(len(query), *mask.shape[1:])
    rows = query.gather(2, positions[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    mask = mask.gather(2, positions[:, None, :, None].expand(-1, mask.shape[1], -1, width))
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return rows, _additive(mask, query.dtype), visible[:, 0]
