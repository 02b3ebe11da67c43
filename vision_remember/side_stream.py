"""Work that a GPU does beside its current stream, for a reader that comes later.

Four things keep it right. The side stream waits for all that was asked of the current stream before. An event marks the
end of the work, and every stream that reads a result waits for it. Memory that a stream uses and another one allocated
is reported to the allocator (``record_stream``), which else hands it out again as soon as its own stream would let it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class SideWork:
    """Results that a side stream may still be computing.

    Args:
        device: the GPU.
        event: the end of the work.
        results: tensors that were made on the side stream.
    """

    def __init__(self, device: torch.device, event: torch.cuda.Event, results: Sequence[Tensor]) -> None:
        self._device, self._event, self._results = device, event, results
        self._joined: set[torch.cuda.Stream] = set()
        self._untraced = _untraced_wait()

    def join(self) -> None:
        """To be called before any result is read: the current stream of the device waits, the first time it asks."""
        self._untraced(self)

    def _wait(self) -> None:
        current = torch.cuda.current_stream(self._device)
        if current in self._joined:
            return
        current.wait_event(self._event)
        for tensor in self._results:
            tensor.record_stream(current)
        self._joined.add(current)


def run_beside(work: Callable[[], T], reads: Sequence[Tensor]) -> tuple[T, SideWork | None]:
    """What ``work`` returns, tensors in tuples and lists; on a side stream where that is possible.

    It is not off CUDA, with gradients, in code that is compiled, while a CUDA graph is captured, or with inputs on
    several devices. Then the work is done in its place.

    Args:
        work: allocates what it returns, and keeps nothing else that is to be read.
        reads: tensors that it reads. Parameters need not be named: who reads a result waits before anything frees them.

    Returns:
        The results, and what to join before they are read; None where nothing has to be waited for.
    """
    device = _device_with_streams(reads)
    if device is None:
        return work(), None
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    for tensor in reads:
        tensor.record_stream(side)
    with torch.cuda.stream(side):
        made = work()
    return made, SideWork(device, side.record_event(), list(_tensors(made)))


def _device_with_streams(reads: Sequence[Tensor]) -> torch.device | None:
    """The one GPU of the tensors, where work for it may leave the current stream."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    devices = {tensor.device for tensor in reads}
    if len(devices) != 1 or not all(device.type == "cuda" for device in devices):
        return None
    return None if torch.cuda.is_current_stream_capturing() else devices.pop()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: work of several passes stands in line."""
    return torch.cuda.Stream(device)


@functools.cache
def _untraced_wait() -> Callable[[SideWork], None]:
    """For layers that are compiled one by one. Not made on import: that would load the compiler."""
    return torch.compiler.disable(SideWork._wait)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry)
