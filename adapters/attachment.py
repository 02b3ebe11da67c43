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
import reprlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vision_remember.adapters.devices import execution_device
from vision_remember.adapters.encoding import Encoding
from vision_remember.adapters.idle_parameters import recall_nothing
from vision_remember.adapters.interception import MethodInterception
from vision_remember.adapters.own_forward import OwnForward
from vision_remember.adapters.resolve import HostParts
from vision_remember.adapters.tokens import PIXELS, placeholders, text_positions, wants_tuple
from vision_remember.adapters.transport import recalls_of, with_rows, without_memory, without_rows
from vision_remember.adapters.unread import UnreadBlocks
from vision_remember.config import VisionRememberConfig
from vision_remember.encoder import find_module, level_width
from vision_remember.memory import Recall, VisionMemory
from vision_remember.remember import VisionRemember, prepare_together, read_by_kernels
from vision_remember.tap import MultiLevelTap
from vision_remember.threads import Switchable

NAME = "vision_remember"
"""The block's name in its decoder layer, and the keyword that carries the memory to it."""

SLOT = "_vision_remember"
"""Where a base keeps its attachment."""

ENCODER_SLOT = "_encoder_pruner"
"""Where a base keeps a pruner that follows its encoding, in place of an attachment."""

METHODS = {"get_image_features": "image", "get_video_features": "video"}
"""The methods that encode, and what."""

INTERCEPTION = MethodInterception(SLOT, METHODS, ENCODER_SLOT)


class Attachment(Switchable):
    """Vision Remember in one host.

    Attributes:
        model: the host.
        spec: its names.
        config: the choices, complete.
        tap: reads the encoder.
        side_stream: whether a GPU prepares what the blocks read beside the decoder's first layers.
        shapes: of the tensors of each block, by name, before anything shards them.
    """

    # The class holds the default: attachments that were pickled before there was a side stream have none of their own.
    side_stream = False

    def __init__(self, parts: HostParts, config: VisionRememberConfig, tap: MultiLevelTap) -> None:
        self.model = parts.model
        self.spec = parts.spec
        self.config = config
        self.tap = tap
        self._base = parts.base
        self._layers = parts.layers
        self._token_ids = {"image": parts.image_token_id}
        if parts.video_token_id is not None:
            self._token_ids["video"] = parts.video_token_id
        # Themselves: what checkpoints activations puts wrappers in their places.
        self._owners = [parts.layers[index] for index in config.layers]
        self._encoding = Encoding(parts.model, parts.spec, tap, config.token_grid, self._owners)
        self._unread = UnreadBlocks(parts.model, tap, parts.spec.feature_levels)
        self._level_dims = [level_width(parts.encoder, parts.encoder_spec)] * len(tap.levels)
        self._decoder = parts.decoder
        takes = inspect.signature(type(parts.base).forward).parameters
        self._own_forward = (
            None
            if "mm_encoder_outputs" in takes
            else OwnForward(self._encoding, self._token_ids, NAME, self._text, self._nothing, self._ready)
        )
        self._handles: list[RemovableHandle] = []
        self.shapes: dict[str, torch.Size] = {}

    def install(self, blocks: dict[int, VisionRemember]) -> None:
        """Puts blocks and hooks in place: all of them, or none if anything fails."""
        try:
            self.tap.install()
            self._unread.install()
            INTERCEPTION.add(self._base)
            setattr(self._base, SLOT, self)
            if self._own_forward is None:
                self._handles.append(self._base.register_forward_pre_hook(self.before_base, with_kwargs=True))
            else:
                self._handles += self._own_forward.register(self._base, self._decoder)
            for index, block in blocks.items():
                self._layers[index].add_module(NAME, block)
                hook = self._layers[index].register_forward_pre_hook(before_layer, with_kwargs=True)
                self._handles.append(hook)
                self.shapes = {name: tensor.shape for name, tensor in block.state_dict().items()}
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Takes away what :meth:`install` put in place."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.tap.remove()
        self._unread.uninstall()
        INTERCEPTION.release(self._base)
        for layer in self._owners:
            layer._modules.pop(NAME, None)
        self._base.__dict__.pop(SLOT, None)

    def keep(self, handle: RemovableHandle) -> None:
        """Takes charge of a further hook, which :meth:`uninstall` removes with the others."""
        self._handles.append(handle)

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
            return without_memory(args, kwargs)
        # A dictionary of our own: torch.compile breaks its graph after a change of the caller's.
        named = dict(zip(inspect.signature(base.forward).parameters, args, strict=False)) if args else {}
        kwargs = {**named, **kwargs}
        recall = self._ready(self._recall(base, kwargs))
        return ((), {**kwargs, NAME: recall}) if recall is not None else None

    def __call__(self, base: nn.Module, method: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        """An encoding method called by anyone but us: outside a forward pass the memory rides along in the output."""
        modality = METHODS[name]
        if not self.enabled:
            return method(base, *args, **kwargs)
        if self._encoding.running:
            # Some encode video by their method for images and pass its output on, as the configuration would have it.
            named = {"return_dict": True} if self._own_forward is None else {}
            return method(base, *args, **{**named, **kwargs})
        if self._own_forward is not None:
            if not self._own_forward.running:
                return method(base, *args, **kwargs)
            return self._own_forward.encode(base, method, modality, *args, **kwargs)
        as_tuple = wants_tuple(base, kwargs.pop("return_dict", None))
        with self._unread.left_out(kwargs) if self._unread.generating else nullcontext():
            encoded = self._encoding.run(base, method, modality, *args, **kwargs, return_dict=True)
        output = with_rows(*encoded)
        return output.to_tuple() if as_tuple else output

    def memories(self, **arguments: Any) -> tuple[VisionMemory, ...]:
        """What the blocks get of images, while disabled as well.

        Args:
            **arguments: of ``get_image_features``.
        """
        named = {"return_dict": True} if self._own_forward is None else {}
        method = INTERCEPTION.original(self._base, "get_image_features")
        return self._encoding.run(self._base, method, "image", **arguments, **named)[1]

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled host is one more instance, perhaps in a process that never attached.
        self.__dict__.update(state)
        INTERCEPTION.add(self._base)

    def _recall(self, base: nn.Module, kwargs: dict[str, Any]) -> Recall | None:
        """The memory of a call and its layout. Encodes raw pixels, which it replaces in ``kwargs`` by the result."""
        encoded = dict(kwargs.get("mm_encoder_outputs") or {})
        recalls: list[Recall] = []
        for modality, token in self._token_ids.items():
            if encoded.get(modality) is not None:
                places = placeholders(base, kwargs, token)
                kernels = self._read_by_kernels(places)
                recalls.append(
                    Recall.joined(recalls_of(encoded[modality], places, "Vision Remember", "vr", by_kernel=kernels))
                )
                encoded[modality] = without_rows(encoded[modality])
            elif any(kwargs.get(name) is not None for name in PIXELS[modality]):
                method = INTERCEPTION.original(base, f"get_{modality}_features")
                arguments = {name: kwargs[name] for name in inspect.signature(method).parameters if name in kwargs}
                with self._unread.left_out(arguments):
                    encoded[modality], known = self._encoding.run(base, method, modality, **arguments, return_dict=True)
                places = placeholders(base, kwargs, token)
                kernels = self._read_by_kernels(places)
                recalls += [
                    memory.recall_images(range(len(memory.spans)), places, by_kernel=kernels) for memory in known
                ]
        # Only now: modalities may share arguments. The rest stays, as positions may follow from the images' sizes.
        for modality in self._token_ids:
            if encoded.get(modality) is not None:
                kwargs.update((name, None) for name in PIXELS[modality] if name in kwargs)
        if recalls:
            kwargs["mm_encoder_outputs"] = encoded
            return Recall.joined(recalls, self._text(base, kwargs))
        return self._nothing(base)

    def _read_by_kernels(self, places: Tensor) -> bool:
        return read_by_kernels(list(self.blocks().values()), places.device)

    def _ready(self, recall: Recall | None) -> Recall | None:
        """A recall with what the blocks can prepare before the decoder runs."""
        if recall is None:
            return None
        return recall.prepared(list(self.blocks().values()), prepare_together, side_stream=self.side_stream)

    def _text(self, base: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
        """(B, S), where text stands, if a block asks for it."""
        if self.config.token_mixer != "text_guided":
            return None
        return text_positions(base, kwargs, self._token_ids.values())

    def _nothing(self, module: nn.Module) -> Recall | None:
        """The recall of a training step without images; outside training None."""
        if not (self.enabled and module.training and torch.is_grad_enabled()):
            return None
        # Processes that train together must agree on which parameters take part in a step.
        return recall_nothing(module, self._level_dims, self._only_of_images())

    def _only_of_images(self) -> Iterator[nn.Parameter]:
        """What only images reach: encoder and projector, and what hosts have beside them, such as the end of a row."""
        text = set(map(id, self._decoder.parameters()))
        yield from (parameter for parameter in self._base.parameters() if id(parameter) not in text)


def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook: the layer's block rewrites the vision positions.

    The block is looked up in the tree at call time, where PEFT, FSDP and copies of the model put theirs.
    """
    recall: Recall | None = kwargs.pop(NAME, None)
    if recall is None:
        return None
    block, device = layer.get_submodule(NAME), execution_device(layer)
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    remembered = recall.through(block, hidden if device is None else hidden.to(device))
    return ((remembered, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": remembered})


def feature_dim(parts: HostParts, tap: MultiLevelTap) -> int:
    """C, width of the joined levels."""
    return level_width(parts.encoder, parts.encoder_spec) * len(tap.levels)


def find_attachment(model: nn.Module) -> Attachment | None:
    """The attachment anywhere in a model, wrapped or not; None if there is none.

    Raises:
        ValueError: that is no model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, as from_pretrained() returns it, not {reprlib.repr(model)}")
    for module in model.modules():
        if SLOT in module.__dict__:
            return module.__dict__[SLOT]
    return None
