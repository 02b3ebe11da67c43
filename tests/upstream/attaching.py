"""Attaches Vision Remember to every model of a class that somebody else's code builds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from vision_remember import attach_vision_remember

LAYERS = (0, 1)


def attach(model: Any) -> None:
    """Attaches unless the weights are not there yet, as a user would after loading; random numbers go on as before."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    with torch.random.fork_rng():
        attach_vision_remember(model, LAYERS)


@contextmanager
def attached_at_birth(model_class: type[Any]) -> Iterator[None]:
    """Inside, what ``model_class(config)`` and ``model_class.from_pretrained`` give carries Vision Remember."""
    construct, load = model_class.__init__, model_class.from_pretrained.__func__

    @functools.wraps(construct)
    def constructing(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        attach(self)

    @functools.wraps(load)
    def loading(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        attach(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    with (
        mock.patch.object(model_class, "__init__", constructing),
        mock.patch.object(model_class, "from_pretrained", classmethod(loading)),
    ):
        yield
