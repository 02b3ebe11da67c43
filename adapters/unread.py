"""Encoder blocks whose output nobody reads do not run while a host encodes images for its own forward pass.

LLaVA hands the last but one hidden state to its projector, so the last block of the encoder works for nobody. While a
forward pass or ``generate()`` encodes, such blocks hand on what they get. Whoever runs the encoder itself, or calls
``get_image_features``, gets all of its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from vision_remember.adapters.interception import MethodInterception
from vision_remember.encoder import find, find_module
from vision_remember.tap import MultiLevelTap
from vision_remember.threads import RunStack

_ENCODERS = ("clip", "siglip")
"""Those whose blocks take the hidden states and return nothing but hidden states."""

_SLOT = "_vision_remember_generation"
_GENERATION = MethodInterception(_SLOT, ["_prepare_multimodal_encoder_kwargs_for_generation"])


class UnreadBlocks:
    """Leaves out the blocks behind the last one that is read.

    Args:
        model: the host.
        tap: reads its encoder.
        levels: path, from the model, of the hidden states that its projector reads; None if more may be read.
    """

    _installed = False

    def __init__(self, model: nn.Module, tap: MultiLevelTap, levels: str | None) -> None:
        self._model, self._tap, self._levels = model, tap, levels
        self._reach: RunStack[int] = RunStack()
        self._generating: RunStack[bool] = RunStack()

    def install(self) -> None:
        """Makes the blocks behind the tap's last level ready to be left out."""
        if self._levels is None or self._tap.spec.name not in _ENCODERS or self._tap.saliency == "map_head":
            return
        setattr(self._model, _SLOT, self)
        _GENERATION.add(self._model)
        self._installed = True
        for number, block in list(enumerate(self._blocks()))[self._tapped() :]:
            if "forward" not in block.__dict__:
                block.forward = _Block(block, number, self._reach)

    def uninstall(self) -> None:
        """The inverse of :meth:`install`; nothing happens if that did nothing."""
        _GENERATION.release(self._model)
        self._model.__dict__.pop(_SLOT, None)
        self._installed = False
        for block in self._blocks():
            if isinstance(block.__dict__.get("forward"), _Block):
                del block.forward

    @property
    def generating(self) -> bool:
        """Whether ``generate()`` of this thread is encoding."""
        return self._generating.innermost() is not None

    @contextmanager
    def left_out(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Inside the ``with`` blocks are left out, given the arguments of the encoding method."""
        if self._levels is None:
            yield
            return
        read: Any = arguments.get(self._levels.rpartition(".")[2])
        read = find(self._model, self._levels) if read is None else read
        count = self._tap.depth + 1
        last = max(level % count for level in (read if isinstance(read, (list, tuple)) else [read]))
        with self._reach.running(max(last, self._tapped())):
            yield

    def __call__(self, model: nn.Module, method: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """``generate()`` encodes: it passes on nothing but what the projector makes."""
        with self._generating.running(True):
            return method(model, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._installed:  # the model itself may still be empty: whoever copies it fills it afterwards
            _GENERATION.add(self._model)

    def _tapped(self) -> int:
        return max(*self._tap.levels, self._tap.saliency_level if self._tap.saliency else 0, 0)

    def _blocks(self) -> list[nn.Module]:
        return list(find_module(self._tap.encoder, self._tap.spec.layers, "blocks").children())


class _Block:
    """A block's forward, unless the block is left out. An object, not a closure: copies get one of their own."""

    def __init__(self, block: nn.Module, number: int, reach: RunStack[int]) -> None:
        self._block, self._number, self._reach = block, number, reach

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reach = self._reach.innermost()
        if reach is None or self._number < reach:
            return type(self._block).forward(self._block, *args, **kwargs)
        return args[0] if args else kwargs["hidden_states"]
