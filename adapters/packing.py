"""Which image token stands for which part of the image: read off the host's own packing, never guessed.

Hosts stitch tiles together, drop padding and put newlines between rows. All that happens in their
``get_image_features`` after the projector. So that code is run once more, on a stand-in for the host whose encoder
returns what it returned before, whose projector returns each token's number, and whose newlines are -1: what comes out
tells where every token went.
"""

from __future__ import annotations

import copy
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_NOWHERE = -1


@dataclass(frozen=True)
class Packing:
    """How a host packed the tokens of its tiles.

    Attributes:
        slots: (R,) on the CPU, for each image token its number among the T*n tokens of all tiles; -1 for a newline.
        tiles: tiles of each image.
    """

    slots: Tensor
    tiles: list[int]


def trace_packing(
    base: nn.Module,
    get_image_features: Callable[..., Any],
    recorded: tuple[dict[str, Any], str],
    *args: Any,
    **kwargs: Any,
) -> Packing:
    """The packing of one call of ``get_image_features``.

    Args:
        base: the module that the method belongs to.
        get_image_features: the method, not bound.
        recorded: what ``base``'s children returned in the call, by attribute: the encoder's output and the projector's,
            (T, n, D); and which of them is the projector.
        *args: of the call.
        **kwargs: of the call.

    Raises:
        ValueError: the tokens are not packed one for one (interpolated, for example).
    """
    returned, projector = recorded
    projected: Tensor = returned[projector]
    tiles, per_tile, width = projected.shape
    # float64 is exact for any number of tokens and survives code that is made for features.
    numbers = torch.arange(tiles * per_tile, dtype=torch.float64, device=projected.device).view(tiles, per_tile, 1)
    stand_in = _StandIn(base)
    for name, value in {**returned, projector: numbers}.items():
        setattr(stand_in, name, _Returning(value, getattr(base, name)))
    for name, parameter in base.named_parameters(recurse=False):
        if parameter.shape == (width,):  # put between tokens, as long as a token: a newline
            setattr(stand_in, name, numbers.new_full((1,), _NOWHERE))
    with torch.no_grad():
        output = get_image_features(stand_in, *args, **kwargs)
    images = [image.flatten().cpu() for image in (output[-1] if isinstance(output, tuple) else output.pooler_output)]
    slots = torch.cat(images)
    inside = slots[slots != _NOWHERE]
    if not torch.equal(slots, slots.round()) or len(inside.unique()) < len(inside):
        raise ValueError(
            f"{type(base).__name__} blends or repeats image tokens where it packs them, so that they stand for "
            "no cells of their own; Vision Remember cannot follow it"
        )
    return Packing(slots.long(), _tiles_per_image(images, tiles, per_tile))


def _tiles_per_image(images: list[Tensor], tiles: int, per_tile: int) -> list[int]:
    """Tiles follow the order of the images: an image ends with the tile of its last token, the last image with all."""
    stops = [int(image.max()) // per_tile + 1 for image in images[:-1]] + [tiles]
    return [stop - start for start, stop in zip([0, *stops], stops, strict=False)]


@contextmanager
def recorded_outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What ``module`` returns in this thread inside the ``with``.

    The hook stays for this one call: a module may be wrapped or copied at any time, and a copy must not take it along.
    """
    outputs: list[Tensor] = []
    thread = threading.get_ident()

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        if threading.get_ident() == thread:
            outputs.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


class _StandIn:
    """Looks like a module to its own methods, but for the attributes set on it."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._base, name)
        if inspect.ismethod(value) and value.__self__ is self._base:
            return types.MethodType(value.__func__, self)
        return value


class _Returning:
    """Looks like a module, but returns one value whatever it is called with."""

    def __init__(self, value: Any, module: nn.Module) -> None:
        self._value = value
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A fresh object each time: hosts write their result into the encoder's output.
        return copy.copy(self._value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
