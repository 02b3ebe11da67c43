"""A pruner in a host: what lives there between attach and detach, and what happens in each forward pass.

1. Before the base's forward, the places of the vision tokens are found; they go into the call's keywords.
2. The base passes its keywords on to the decoder and to every layer, as transformers models do.
3. Before each layer the states, the mask and the positions are cut to the tokens that are left; behind the last, the
   states get their full length back.

A cache knows which tokens its layers hold (:mod:`vision_remember.adapters.pruned_cache`): later passes need nothing
else.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vision_remember.adapters.activation_checkpointing import HOOKS_STAY_OUTSIDE
from vision_remember.adapters.devices import execution_device
from vision_remember.adapters.passage import Passage
from vision_remember.adapters.pruned_cache import cache_of, pruned_layer
from vision_remember.adapters.resolve import HostParts
from vision_remember.adapters.shortening import shortened
from vision_remember.adapters.tokens import PIXELS, placeholders
from vision_remember.adapters.transport import without_memory
from vision_remember.pruning import DecoderPruner, Pruner
from vision_remember.threads import Switchable

NAME = "vision_pruning"
"""The keyword that carries a passage to the layers."""

SLOT = "_vision_pruner"
"""Where a base keeps its pruner."""


class PrunerAttachment(Switchable):
    """A pruner in one host.

    Attributes:
        model: the host.
        name: the pruner's name in ``PRUNERS``.
        pruner: the pruner.
        depth: the number of the decoder's layers.
        last: (layers, B), vision tokens that each layer was given in the last forward pass with images; None before.
    """

    def __init__(self, parts: HostParts, name: str, pruner: Pruner) -> None:
        self.model = parts.model
        self.name = name
        self.pruner = pruner
        self.depth = len(parts.layers)
        self.decoder = parts.spec.decoder
        self.last: Tensor | None = None
        self._base = parts.base
        self._layers = parts.layers
        self._tokens = [token for token in (parts.image_token_id, parts.video_token_id) if token is not None]
        self._handles: list[RemovableHandle] = []

    def install(self) -> None:
        """Puts the hooks in place: all of them, or none if anything fails."""
        try:
            setattr(self._base, SLOT, self)
            self._handles.append(self._base.register_forward_pre_hook(self.before_base, with_kwargs=True))
            for index, layer in enumerate(self._layers):
                self._handles.append(layer.register_forward_pre_hook(BeforeLayer(index), with_kwargs=True))
            self._handles.append(self._layers[-1].register_forward_hook(behind_last_layer, with_kwargs=True))
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Takes away what :meth:`install` put in place."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._base.__dict__.pop(SLOT, None)

    @property
    def installed(self) -> bool:
        """Whether the host has it now."""
        return self._base.__dict__.get(SLOT) is self

    def before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook: finds the vision tokens of a call that has any."""
        if not self.enabled:
            return without_memory(args, kwargs)
        named = dict(zip(inspect.signature(base.forward).parameters, args, strict=False)) if args else {}
        kwargs = {**named, **kwargs}
        # Not by the tokens alone: a decoder may make up a placeholder while it generates.
        encoded = kwargs.get("mm_encoder_outputs") or {}
        raw = [kwargs.get(name) for names in PIXELS.values() for name in names]
        if not any(value is not None for value in (*encoded.values(), *raw)):
            return None
        vision = torch.stack([placeholders(base, kwargs, token) for token in self._tokens]).any(0)
        plan = self._plan(base, kwargs)
        passage = Passage(plan, self.depth, vision, _padding(kwargs.get("attention_mask")), self._report)
        return (), {**kwargs, NAME: passage}

    def _plan(self, base: nn.Module, kwargs: dict[str, Any]) -> DecoderPruner:
        """What is to be dropped of a call; may change its keywords."""
        assert isinstance(self.pruner, DecoderPruner)
        _refuse_chunks(kwargs.get("mm_encoder_outputs") or {})
        return self.pruner

    def _report(self, given: Tensor) -> None:
        self.last = given


@dataclass(frozen=True)
class BeforeLayer:
    """The hook in front of a decoder layer. An object, not a closure, so that copies of the model get their own.

    Attributes:
        index: the layer's number.
    """

    index: int

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cuts the layer's arguments to the tokens that are left."""
        passage: Passage | None = kwargs.get(NAME)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        device = execution_device(layer)
        if device is not None:
            hidden = hidden.to(device)
        cache = cache_of(kwargs)
        length = hidden.shape[1]
        if passage is not None:
            _refuse_replay(layer)
            length = passage.length
            hidden = passage.enter(self.index, layer, hidden, kwargs, lambda: _stored(cache, layer))
        cut = None if passage is None else passage.cut
        stored = pruned_layer(cache, layer, len(hidden), hidden.device, make=cut is not None)
        if cut is not None or stored is not None:
            kwargs = shortened(layer, kwargs, cut, stored, length)
        if stored is not None:
            if cut is None:
                stored.advance(None, None, length)
            else:
                stored.advance(cut.columns, cut.held, length, cut.tail)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def behind_last_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hook: gives the states their full length back."""
    passage: Passage | None = kwargs.get(NAME)
    if passage is None:
        return None
    if isinstance(output, tuple):
        return (passage.leave(output[0]), *output[1:])
    return passage.leave(output)


def find_pruner(model: nn.Module) -> PrunerAttachment | None:
    """The pruner anywhere in a model, wrapped or not; None if there is none."""
    for module in model.modules():
        if SLOT in module.__dict__:
            return module.__dict__[SLOT]
    return None


def _refuse_replay(layer: nn.Module) -> None:
    """Raises RuntimeError if the layer's hooks would run again in the backward pass, when the tokens are gone."""
    if not HOOKS_STAY_OUTSIDE and getattr(layer, "gradient_checkpointing", False) and layer.training:
        raise RuntimeError(
            "before transformers 5.23, activation checkpointing runs a pruner's hooks again in the backward pass: "
            "switch it off or update transformers"
        )


def _stored(cache: Any, layer: nn.Module) -> Any:
    """The layer's own layer of the cache; None if it has none yet."""
    attention: Any = layer.self_attn
    layers = () if cache is None else cache.layers
    return layers[attention.layer_idx] if attention.layer_idx < len(layers) else None


def _padding(mask: Any) -> Tensor | None:
    """(B, p + S), what is not padding, as far as the call tells."""
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _refuse_chunks(encoded: dict[str, Any]) -> None:
    """Raises ValueError for a part of a prompt: who decides by the last token must see it."""
    for output in encoded.values():
        if output is not None and getattr(output, "last_hidden_state", None) is None:
            raise ValueError(
                "this prompt comes in chunks (prefill_chunk_size), and a pruner that reads the decoder's attention has "
                "to see the whole: generate without prefill_chunk_size"
            )
