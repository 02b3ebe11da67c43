"""Projectors: one file each, listed in one table."""

from __future__ import annotations

import inspect
from typing import Any

from vision_remember.grid import Grid
from vision_remember.projectors.adaptive_avg_pool import AdaptiveAvgPool
from vision_remember.projectors.base import Projector
from vision_remember.registry import Registry, did_you_mean

PROJECTORS: Registry[type[Projector]] = Registry(
    "projector",
    {
        "adaptive_avg_pool": AdaptiveAvgPool,
    },
)


def build_projector(
    name: str, in_dim: int, out_dim: int, *, ratio: int | None = None, out_grid: Grid | None = None, **options: Any
) -> Projector:
    """Builds the projector called ``name``.

    Args:
        name: an entry of ``PROJECTORS``.
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token.
        out_grid: (h, w) of the tokens instead of a ratio.
        **options: further keyword arguments of the class.

    Raises:
        ValueError: an unknown name or option; the message suggests the closest one.
    """
    cls = PROJECTORS[name]
    known = [p for p in inspect.signature(cls).parameters if p not in ("in_dim", "out_dim")]
    for option in options:
        if option not in known:
            raise ValueError(f"projector {name!r} has no option {option!r}: {did_you_mean(option, known)}")
    return cls(in_dim, out_dim, ratio=ratio, out_grid=out_grid, **options)


def projector_name(projector: Projector) -> str:
    """The table's name of a projector's class."""
    return next(name for name, cls in PROJECTORS.items() if cls is type(projector))


__all__ = ["PROJECTORS", "AdaptiveAvgPool", "Projector", "build_projector", "projector_name"]
