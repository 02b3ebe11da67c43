"""Streams of a GPU that does not exist: who may read what when, and whose memory is handed out too early.

Every operator happens on the current stream of its device. A stream knows what happened before it: its own operators,
and those of others that it waited for. Reading what a stream did not wait for is a race. Using memory that another
stream allocated, without having reported it by ``record_stream``, lets the allocator hand it out while it is in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(eq=False)
class Stream:
    """Stands for ``torch.cuda.Stream``.

    Attributes:
        known: how many operators of each stream happened before whatever this one does next.
        waits: for events, in all.
    """

    device: torch.device
    known: dict[Stream, int] = field(default_factory=dict)
    waits: int = 0

    def wait_stream(self, other: Stream) -> None:
        self._learn(other.known)

    def record_event(self) -> dict[Stream, int]:
        return dict(self.known)

    def wait_event(self, event: dict[Stream, int]) -> None:
        self.waits += 1
        self._learn(event)

    def _learn(self, known: dict[Stream, int]) -> None:
        for stream, count in known.items():
            self.known[stream] = max(count, self.known.get(stream, 0))


@dataclass
class _Memory:
    """Attributes:
    tensor: keeps the storage alive, so that no other gets its name.
    home: the stream that allocated it.
    written: by which stream, and as which of its operators.
    users: streams that read or wrote it.
    reported: to the allocator, by ``record_stream``.
    """

    tensor: Tensor
    home: Stream
    written: tuple[Stream, int]
    users: set[Stream] = field(default_factory=set)
    reported: set[Stream] = field(default_factory=set)


class Streams(TorchDispatchMode):
    """What happens on which stream. Tensors from before, as weights are, belong to none.

    Attributes:
        races: operators that read what their stream did not wait for.
        made: every stream that was asked for.
        capturing: whether a CUDA graph is said to be captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.races: list[str] = []
        self.made: list[Stream] = []
        self.capturing = False
        self._current: dict[torch.device, Stream] = {}
        self._memory: dict[StorageWeakRef, _Memory] = {}

    def current(self, device: torch.device) -> Stream:
        return self._current.setdefault(device, Stream(device))

    def new(self, device: torch.device) -> Stream:
        self.made.append(Stream(device))
        return self.made[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before = self.current(stream.device)
        self._current[stream.device] = stream
        yield
        self._current[stream.device] = before

    def report(self, tensor: Tensor, stream: Stream) -> None:
        memory = self._memory.get(StorageWeakRef(tensor.untyped_storage()))
        if memory is not None:
            memory.reported.add(stream)

    @property
    def unreported(self) -> list[tuple[int, ...]]:
        """Shapes of tensors whose memory may be handed out while a stream uses it."""
        return [tuple(m.tensor.shape) for m in self._memory.values() if m.users - m.reported - {m.home}]

    def operators(self, stream: Stream) -> int:
        """How many happened on the stream."""
        return stream.known.get(stream, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if func.is_view or not [*made, *given]:
            return result
        stream = self.current((made or given)[0].device)
        number = stream.known[stream] = self.operators(stream) + 1
        read = {StorageWeakRef(x.untyped_storage()) for x in given}
        for memory in (self._memory[storage] for storage in read if storage in self._memory):
            writer, when = memory.written
            if stream.known.get(writer, 0) < when:
                self.races.append(str(func))
            memory.users.add(stream)
            if func._schema.is_mutable:
                memory.written = stream, number
        for x in made:
            storage = StorageWeakRef(x.untyped_storage())
            if storage not in read:
                self._memory.setdefault(storage, _Memory(x, stream, (stream, number), {stream}))
        return result


def standing_in(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts ``streams`` in the place of what torch.cuda has."""
    monkeypatch.setattr(torch.cuda, "Stream", streams.new)
    monkeypatch.setattr(torch.cuda, "current_stream", streams.current)
    monkeypatch.setattr(torch.cuda, "stream", streams.on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: streams.capturing)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: streams.report(tensor, stream))
