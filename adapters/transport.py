"""How a memory travels from ``get_image_features`` to the forward pass.

``generate()`` encodes images before the first forward. It then repeats the image tokens for beams and cuts them up for
chunked prefill, and hands over nothing but ``pooler_output`` and ``deepstack_features``, each treated alike. So the
encoded output gets ``deepstack_features`` of our own: one row per image token, which know the memory they belong to.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from vision_remember.memory import VisionMemory

METHOD = "get_image_features"


class MemoryRows(Tensor):
    """(n, 1) numbers of the image tokens of one image, in a memory's order.

    Attributes:
        memory: the memory; whatever is made of the rows by slicing or joining still knows it.
        whole_image: the image whose tokens these are, all and in order; None for rows made from others.
    """

    memory: VisionMemory
    whole_image: int | None

    @classmethod
    def of(cls, memory: VisionMemory, image: int, device: torch.device) -> MemoryRows:
        """The rows of one image."""
        span = memory.spans[image].rows
        rows = torch.arange(span.start, span.stop, device=device)[:, None].as_subclass(cls)
        rows.memory, rows.whole_image = memory, image
        return rows

    def __deepcopy__(self, memo: Any) -> MemoryRows:
        # Assisted decoding copies its arguments; rows are never written to.
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls) and "memory" not in result.__dict__:
            result.memory, result.whole_image = _source(args).memory, None
        return result


def _source(args: Sequence[Any]) -> MemoryRows:
    """The first rows among the arguments of a tensor function."""
    for arg in args:
        if isinstance(arg, MemoryRows):
            return arg
        if isinstance(arg, (list, tuple)) and any(isinstance(item, MemoryRows) for item in arg):
            return _source(arg)
    raise TypeError("these rows came from no other rows")


@functools.cache
def _with_deepstack(cls: type[ModelOutput]) -> type[ModelOutput]:
    """The output class with a field ``deepstack_features``; generate() rebuilds outputs by their own class."""
    name = f"{cls.__name__}WithMemory"
    field = ("deepstack_features", Any, dataclasses.field(default=None))
    return dataclasses.make_dataclass(name, [field], bases=(cls,))


def with_rows(output: Any, memory: VisionMemory) -> ModelOutput:
    """The output of ``get_image_features``, with rows that lead back to ``memory``."""
    images = output.pooler_output
    rows = [MemoryRows.of(memory, number, image.device) for number, image in enumerate(images)]
    fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    cls: type[ModelOutput] = type(output)
    return _with_deepstack(cls)(**fields, deepstack_features=[rows])


def rows_of(output: Any) -> list[MemoryRows] | None:
    """The rows that :func:`with_rows` put into an output, as generate() passed them on; None if there are none."""
    layers = getattr(output, "deepstack_features", None) or []
    for rows in layers:
        if all(isinstance(row, MemoryRows) for row in rows):
            return list(rows)
    return None


class FeatureInterception:
    """Wraps ``get_image_features`` of a class, for those of its instances that a handler was added for.

    A method cannot be hooked, and replacing it on an instance would not follow copies of the model. The class's own
    method is put back when the last instance is released.
    """

    def __init__(self, slot: str) -> None:
        self._slot = slot
        self._instances: weakref.WeakKeyDictionary[type, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()
        self._originals: weakref.WeakKeyDictionary[type, Callable[..., Any]] = weakref.WeakKeyDictionary()

    def add(self, base: nn.Module) -> None:
        """From now on ``base``'s attribute ``slot`` handles its ``get_image_features``."""
        cls = type(base)
        if cls not in self._originals:
            self._instances[cls] = weakref.WeakSet()
            self._originals[cls] = getattr(cls, METHOD)
            setattr(cls, METHOD, self._wrapper(getattr(cls, METHOD)))
        self._instances[cls].add(base)

    def release(self, base: nn.Module) -> None:
        """The inverse of :meth:`add`; nothing happens if that was not called."""
        cls = next((c for c in type(base).__mro__ if base in self._instances.get(c, ())), None)
        if cls is None:
            return
        self._instances[cls].discard(base)
        if not self._instances[cls]:
            original = self._originals.pop(cls)
            delattr(cls, METHOD)
            if getattr(cls, METHOD, None) is not original:
                setattr(cls, METHOD, original)

    def original(self, base: nn.Module) -> Callable[..., Any]:
        """``get_image_features`` as ``base``'s class has it by itself, not bound."""
        return next(self._originals[c] for c in type(base).__mro__ if c in self._originals)

    def _wrapper(self, original: Callable[..., Any]) -> Callable[..., Any]:
        slot = self._slot

        @functools.wraps(original)
        def get_image_features(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            handler = self.__dict__.get(slot)
            if handler is None:
                return original(self, *args, **kwargs)
            return handler.encode_ahead(self, original, *args, **kwargs)

        return get_image_features
