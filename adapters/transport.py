"""How a memory travels from ``get_image_features`` to the forward pass.

``generate()`` encodes images before the first forward. It then repeats the image tokens for beams and cuts them up for
chunked prefill, and hands over nothing but ``pooler_output`` and ``deepstack_features``, each treated alike. So the
encoded output gets ``deepstack_features`` of our own: one row per image token, which know the memory they belong to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from vision_remember.adapters.tokens import image_tokens
from vision_remember.memory import Recall, VisionMemory


class MemoryRows(Tensor):
    """(n, 1) numbers of the image tokens of one image, in the memories' order.

    Attributes:
        memory: the memories of the call; whatever is made of the rows by slicing or joining still knows it.
        whole_image: the image whose tokens these are, all and in order; None for rows made from others.
    """

    memory: tuple[VisionMemory, ...]
    whole_image: int | None

    @classmethod
    def of(cls, memory: tuple[VisionMemory, ...], image: int, device: torch.device) -> MemoryRows:
        """The rows of one image."""
        span = memory[0].spans[image].rows
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
def _with_memory(cls: type[ModelOutput]) -> type[ModelOutput]:
    """The output class with a field ``deepstack_features``; generate() rebuilds outputs by their own class."""

    def to_tuple(self: ModelOutput) -> tuple[Any, ...]:
        # Who asks for a tuple wants the features, not a forward pass with them.
        members = {**dict(self.items()), "deepstack_features": _own_deepstack(self)}
        return tuple(member for member in members.values() if member is not None)

    name = f"{cls.__name__}WithMemory"
    field = ("deepstack_features", Any, dataclasses.field(default=None))
    return dataclasses.make_dataclass(name, [field], bases=(cls,), namespace={"to_tuple": to_tuple})


def with_rows(output: Any, memory: tuple[VisionMemory, ...]) -> ModelOutput:
    """An output of the host's encoding, with rows that lead back to ``memory``."""
    images = image_tokens(output)
    rows = [MemoryRows.of(memory, number, image.device) for number, image in enumerate(images)]
    fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    own = fields.pop("deepstack_features", None)
    cls: type[ModelOutput] = type(output)
    result = _with_memory(cls)(**fields, deepstack_features=[*(own or ()), rows])
    for name in output:
        # The order of a tuple is the order in which the host filled its output in.
        result.move_to_end(name)
    return result


def without_rows(output: Any) -> Any:
    """The output as the host made it: its own deepstack features only."""
    fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return type(output)(**{**fields, "deepstack_features": _own_deepstack(output)})


def without_memory(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A call of the base with the outputs in it as the host made them; None if they are, or if there are none."""
    encoded = kwargs.get("mm_encoder_outputs") or {}
    ours = {modality: without_rows(output) for modality, output in encoded.items() if rows_of(output) is not None}
    return (args, {**kwargs, "mm_encoder_outputs": {**encoded, **ours}}) if ours else None


def rows_of(output: Any) -> list[MemoryRows] | None:
    """The rows that :func:`with_rows` put into an output, as generate() passed them on; None if there are none."""
    layers = getattr(output, "deepstack_features", None) or []
    return next((list(rows) for rows in layers if _ours(rows)), None)


def recalls_of(output: Any, places: Tensor, reader: str, handle: str, *, by_kernel: bool = False) -> list[Recall]:
    """What was encoded ahead, whole images or parts of some, at the places of a sequence: one recall per memory.

    Args:
        output: What `get_image_features` returned, as generate() passed it on.
        places: (B, S), where vision tokens go.
        reader: Who asks, for the error.
        handle: What the documentation calls the handle that switches it off.
        by_kernel: See :meth:`VisionMemory.recall_images`.

    Raises:
        ValueError: the images were encoded without memories.
    """
    rows = rows_of(output)
    if rows is None:
        raise ValueError(
            f"these images were encoded without {reader}: call get_image_features after attaching, or run inside "
            f"`with {handle}.disabled():`"
        )
    known, images = rows[0].memory, [row.whole_image for row in rows if row.whole_image is not None]
    if len(images) == len(rows):
        return [memory.recall_images(images, places, by_kernel=by_kernel) for memory in known]
    numbers = torch.cat([row.as_subclass(Tensor) for row in rows]).flatten()
    return [memory.recall_rows(numbers, places) for memory in known]


def _own_deepstack(output: Any) -> list[Any] | None:
    return [rows for rows in output.deepstack_features or () if not _ours(rows)] or None


def _ours(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, MemoryRows) for row in rows)
