"""What a CUDA device would be asked to do, counted without one: fake tensors know shapes and devices, not numbers.

A launch is one call of an operator that computes: views, allocations and questions about a tensor are none. Fake
tensors refuse whatever a host would have to wait for (``.item()``, ``nonzero``, indexing by a mask), so a run that ends
is free of it. Some operators start more than one kernel, as far as ATen's sources tell: a copy ahead of an out-of-place
``index_copy``, a contiguous copy of a view that ``layer_norm`` gets, a wider mask for a fused attention whose number of
keys is no multiple of eight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_NO_LAUNCH = {
    aten.detach.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.lift_fresh.default,
    torch.ops.prim.device.default,
}


class Launches(TorchDispatchMode):
    """The operators that compute, in order.

    Attributes:
        names: of the operators.
        further: kernels that they start beyond one each.
        copies: between devices.
        peak: largest number of bytes that results held at once; what was there before does not count.
        shapes: of all results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.further = 0
        self.copies = 0
        self.peak = 0
        self.shapes: set[tuple[int, ...]] = set()
        self._alive: dict[StorageWeakRef, int] = {}
        self._given: set[StorageWeakRef] = set()

    @property
    def strict(self) -> int:
        """Kernels, the further ones included."""
        return len(self.names) + self.further

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (storage := StorageWeakRef(tensor.untyped_storage())) not in self._alive:
                self._given.add(storage)
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func not in _NO_LAUNCH:
            self.names.append(str(func))
            self._look_closer(func, args)
            inputs = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim}
            self.copies += any(isinstance(x, Tensor) and x.device not in inputs for x in tree_leaves(result) if inputs)
        self._keep(result)
        return result

    def _keep(self, result: Any) -> None:
        """Counts the memory of results for as long as it lives."""
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.shapes.add(tuple(tensor.shape))
                storage = tensor.untyped_storage()
                if StorageWeakRef(storage) not in self._given:
                    self._alive.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(self._alive.values()))

    def _look_closer(self, func: Any, args: Any) -> None:
        if func in (aten.index_copy.default, aten.index_add.default):
            self.further += 1
        if func == aten.native_layer_norm.default and not args[0].is_contiguous():
            self.further += 1


class _Fused(TorchFunctionMode):
    """Attention and RMS norm as one launch each: fake tensors cannot ask a device for kernels and take them apart."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm and hasattr(aten, "_fused_rms_norm"):
            self._launches.names.append("fused norm")
            return torch.empty_like(args[0])
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, *mask = args
        self._launches.names.append("fused attention")
        if mask and mask[0] is not None and key.shape[-2] % 8:
            self._launches.further += 1
        batch, heads, length, _ = query.shape
        return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


@contextmanager
def fake(device: str) -> Iterator[Callable[..., Tensor]]:
    """Inside, the yielded function makes tensors of a device that need not exist, and hold nothing.

    Gradients need a CPU: autograd asks a CUDA device for its streams.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    with FakeTensorMode():
        yield empty


@contextmanager
def counted() -> Iterator[Launches]:
    """Counts what is computed inside."""
    launches = Launches()
    with launches, _Fused(launches):
        yield launches


def moved(module: nn.Module, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The module with fake parameters, which hold nothing; to be called inside :func:`fake`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
    return module
