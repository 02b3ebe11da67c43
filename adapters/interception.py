"""Wrapping methods of a host's class: a method cannot be hooked as a module's call can."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class MethodInterception:
    """Wraps methods of a class, for those of its instances that a handler was added for.

    Replacing a method on an instance would not follow copies of the model. The class's own methods are put back when
    the last instance is released.

    Args:
        slot: the attribute of an instance that holds its handler, called with the instance, its own method (not bound),
            the method's name and the arguments.
        methods: names; a class that lacks one goes without.
        *other_slots: where else a handler may be held; an instance has one.
    """

    def __init__(self, slot: str, methods: Iterable[str], *other_slots: str) -> None:
        self._slots, self._methods = (slot, *other_slots), tuple(methods)
        self._instances: weakref.WeakKeyDictionary[type, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()
        self._originals: weakref.WeakKeyDictionary[type, dict[str, Callable[..., Any]]] = weakref.WeakKeyDictionary()

    def add(self, base: nn.Module) -> None:
        """From now on ``base``'s attribute ``slot`` handles its methods."""
        cls = type(base)
        if cls not in self._originals:
            self._instances[cls] = weakref.WeakSet()
            own = {name: getattr(cls, name) for name in self._methods if callable(getattr(cls, name, None))}
            self._originals[cls] = own
            for name, original in own.items():
                setattr(cls, name, self._wrapper(original, name))
        self._instances[cls].add(base)

    def release(self, base: nn.Module) -> None:
        """The inverse of :meth:`add`; nothing happens if that was not called."""
        cls = next((c for c in type(base).__mro__ if base in self._instances.get(c, ())), None)
        if cls is None:
            return
        self._instances[cls].discard(base)
        if not self._instances[cls]:
            for name, original in self._originals.pop(cls).items():
                delattr(cls, name)
                if getattr(cls, name, None) is not original:
                    setattr(cls, name, original)

    def original(self, base: nn.Module, name: str) -> Callable[..., Any]:
        """The method as ``base``'s class has it by itself, not bound."""
        return next(self._originals[c] for c in type(base).__mro__ if c in self._originals)[name]

    def _wrapper(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        slots = self._slots

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            handler = next((held for slot in slots if (held := getattr(self, slot, None)) is not None), None)
            return (
                original(self, *args, **kwargs) if handler is None else handler(self, original, name, *args, **kwargs)
            )

        return method
