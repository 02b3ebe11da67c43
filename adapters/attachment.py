"""The attachment: what lives in a host between attach and detach, and what happens in each forward pass.

A forward pass, step by step:

1. Before the base's forward, the images are encoded while the tap records (or generate() did so already). The features
   become a memory, the placeholders' positions a layout; both go into the call's keywords.
2. The base passes its keywords on to the decoder and to every layer, as transformers models do.
3. Before a layer that owns a block, the keyword is taken and the block rewrites the vision positions.

Nothing about a call is kept anywhere else: no state can be stale, and checkpointed layers find the right memory again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vision_remember.adapters.activation_checkpointing import refuse_reentrant
from vision_remember.adapters.idle_parameters import join_idle_parameters
from vision_remember.adapters.packing import recorded_outputs, trace_packing
from vision_remember.adapters.resolve import HostParts, projected_grid
from vision_remember.adapters.transport import FeatureInterception, rows_of, with_rows
from vision_remember.config import VisionRememberConfig
from vision_remember.encoder import find_module
from vision_remember.grid import Grid
from vision_remember.memory import Recall, VisionMemory, spans
from vision_remember.remember import VisionRemember
from vision_remember.tap import MultiLevelTap

NAME = "vision_remember"
"""The block's name in its decoder layer, and the keyword that carries the memory to it."""

SLOT = "_vision_remember"
"""Where a base keeps its attachment."""

INTERCEPTION = FeatureInterception(SLOT)


class Attachment:
    """Vision Remember in one host.

    Attributes:
        model: the host.
        spec: its names.
        config: the choices, complete.
        tap: reads the encoder.
        enabled: whether forward passes use it.
    """

    def __init__(self, parts: HostParts, config: VisionRememberConfig, tap: MultiLevelTap) -> None:
        self.model = parts.model
        self.spec = parts.spec
        self.config = config
        self.tap = tap
        self.enabled = True
        self._base = parts.base
        self._layers = parts.layers
        self._image_token_id = parts.image_token_id
        self._feature_dim = feature_dim(parts, tap)
        self._handles: list[RemovableHandle] = []

    def install(self, blocks: dict[int, VisionRemember]) -> None:
        """Puts blocks and hooks in place: all of them, or none if anything fails."""
        try:
            self.tap.install()
            INTERCEPTION.add(self._base)
            setattr(self._base, SLOT, self)
            self._handles.append(self._base.register_forward_pre_hook(self.before_base, with_kwargs=True))
            for index, block in blocks.items():
                self._layers[index].add_module(NAME, block)
                hook = self._layers[index].register_forward_pre_hook(before_layer, with_kwargs=True)
                self._handles.append(hook)
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Takes away what :meth:`install` put in place."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.tap.remove()
        INTERCEPTION.release(self._base)
        for index in self.config.layers:
            self._layers[index]._modules.pop(NAME, None)
        self._base.__dict__.pop(SLOT, None)

    @property
    def installed(self) -> bool:
        """Whether the host has it now."""
        return self._base.__dict__.get(SLOT) is self

    def blocks(self) -> dict[int, nn.Module]:
        """The blocks by layer, as the module tree holds them now (PEFT, for one, wraps them there)."""
        return {index: find_module(self._layers[index], NAME, "block") for index in self.config.layers}

    def before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook: encodes what there is to encode and hands the memory to the decoder."""
        if not self.enabled:
            return None
        # A dictionary of our own: torch.compile breaks its graph after a change of the caller's.
        named = dict(zip(inspect.signature(base.forward).parameters, args, strict=False)) if args else {}
        kwargs = {**named, **kwargs}
        recall = self._recall(base, kwargs)
        return ((), {**kwargs, NAME: recall}) if recall is not None else None

    def encode_ahead(self, base: nn.Module, get_image_features: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``get_image_features`` outside a forward pass: the memory rides along in the output."""
        if not self.enabled:
            return get_image_features(base, *args, **kwargs)
        output, memory = self._encode(base, get_image_features, *args, **kwargs)
        # A caller who asks for a tuple wants the features, not a forward pass with them.
        return output if isinstance(output, tuple) else with_rows(output, memory)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled host is one more instance, perhaps in a process that never attached.
        self.__dict__.update(state)
        INTERCEPTION.add(self._base)

    def _encode(
        self, base: nn.Module, get_image_features: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, VisionMemory]:
        projector = find_module(self.model, self.spec.projector, "projector")
        outputs: AbstractContextManager[list[Tensor]] = (
            nullcontext([]) if self.spec.plain else recorded_outputs(projector)
        )
        with self.tap.record() as captured, outputs as projected:
            output = get_image_features(base, *args, **kwargs)
        features = captured.joined()
        # Inputs of a frozen encoder may require grad (activation checkpointing does that); its features need none, and
        # two checkpointed layers must not share a graph.
        if not any(parameter.requires_grad for parameter in self.tap.encoder.parameters()):
            features = features.detach()
        elif features.requires_grad:
            refuse_reentrant(self._layers[index] for index in self.config.layers)
        images = output[-1] if isinstance(output, tuple) else output.pooler_output
        counts = [len(image) for image in images]
        token_grid = self.config.token_grid or projected_grid(projector, captured.grid)
        if self.spec.plain:
            slots, tiles = None, [1] * len(counts)
            _check_tokens(counts, token_grid)
        else:
            _check_tokens([tile.shape[0] for tile in projected[-1]], token_grid)
            encoder_name, projector_name = (
                path.rpartition(".")[2] for path in (self.spec.encoder, self.spec.projector)
            )
            returned = {encoder_name: captured.output, projector_name: projected[-1]}
            packing = trace_packing(base, get_image_features, returned, projector_name, *args, **kwargs)
            slots, tiles = packing.slots, packing.tiles
        memory = VisionMemory(features, captured.saliency, captured.grid, token_grid, spans(counts, tiles), slots)
        return output, memory

    def _recall(self, base: nn.Module, kwargs: dict[str, Any]) -> Recall | None:
        """The memory of a call and its layout. Encodes raw images, which it replaces in ``kwargs`` by the result."""
        encoded = kwargs.get("mm_encoder_outputs") or {}
        if kwargs.get("pixel_values") is not None and not encoded:
            original = INTERCEPTION.original(base)
            names = [name for name in inspect.signature(original).parameters if name in kwargs]
            output, memory = self._encode(base, original, **{n: kwargs.pop(n) for n in names}, return_dict=True)
            kwargs["mm_encoder_outputs"] = {"image": output}
            return memory.recall_images(range(len(memory.spans)), self._placeholders(base, kwargs))
        if encoded.get("image") is not None:
            rows = rows_of(encoded["image"])
            if rows is None:
                raise ValueError(
                    "these images were encoded without Vision Remember: call get_image_features after attaching, or "
                    "run inside `with vr.disabled():`"
                )
            memory, images = rows[0].memory, [row.whole_image for row in rows if row.whole_image is not None]
            if len(images) == len(rows):
                return memory.recall_images(images, self._placeholders(base, kwargs))
            numbers = torch.cat([row.as_subclass(Tensor) for row in rows]).flatten()
            return memory.recall_rows(numbers, self._placeholders(base, kwargs))
        if base.training and torch.is_grad_enabled():
            # Processes that train together must agree on which parameters take part in a step.
            like = next(p for p in base.parameters() if p.is_floating_point())
            recall = VisionMemory.nothing(self._feature_dim, like)
            projector = find_module(self.model, self.spec.projector, "projector")
            features = join_idle_parameters(recall.memory.features, (projector, self.tap.encoder))
            return replace(recall, memory=replace(recall.memory, features=features))
        return None

    def _placeholders(self, base: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        """(B, S), where the image tokens go."""
        if kwargs.get("input_ids") is not None:
            return kwargs["input_ids"] == self._image_token_id
        embeds: Tensor = kwargs["inputs_embeds"]
        token = torch.full((), self._image_token_id, dtype=torch.long, device=embeds.device)
        return (embeds == base.get_input_embeddings()(token)).all(-1)  # type: ignore[operator]


def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook: the layer's block rewrites the vision positions.

    The block is looked up in the tree at call time, where PEFT, FSDP and copies of the model put theirs.
    """
    recall: Recall | None = kwargs.pop(NAME, None)
    if recall is None:
        return None
    block = layer.get_submodule(NAME)
    if args:
        return (recall.through(block, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": recall.through(block, kwargs["hidden_states"])}


def _check_tokens(counts: list[int], token_grid: Grid) -> None:
    """Raises ValueError unless every tile has the tokens of its grid."""
    h, w = token_grid
    wrong = [count for count in counts if count != h * w]
    if wrong:
        raise ValueError(
            f"the projector made {wrong[0]} vision tokens of a tile, but token_grid={h}x{w} has {h * w}; give its grid "
            "to attach_vision_remember(model, token_grid=(rows, columns))"
        )


def feature_dim(parts: HostParts, tap: MultiLevelTap) -> int:
    """C, width of the joined levels."""
    patches: Any = find_module(parts.encoder, parts.encoder_spec.patch_embedding, "patch embedding")
    return patches.out_channels * len(tap.levels)


def find_attachment(model: nn.Module) -> Attachment | None:
    """The attachment anywhere in a model, wrapped or not; None if there is none."""
    for module in model.modules():
        if SLOT in module.__dict__:
            return module.__dict__[SLOT]
    return None
