"""Training-free pruners of vision tokens: one file each, listed in one table."""

from __future__ import annotations

import dataclasses
from typing import Any

from vision_remember.pruning.base import (
    DecoderPruner,
    EncoderPruner,
    Evidence,
    Kept,
    Pruner,
    Selection,
    Stage,
    Tokens,
)
from vision_remember.pruning.controls import Random, Uniform
from vision_remember.pruning.fastv import FastV
from vision_remember.pruning.pyramid_drop import PyramidDrop
from vision_remember.registry import Registry, did_you_mean

PRUNERS: Registry[type[Pruner]] = Registry(
    "pruner",
    {
        "fastv": FastV,
        "pyramid_drop": PyramidDrop,
        "random": Random,
        "uniform": Uniform,
    },
)


def build_pruner(name: str, **options: Any) -> Pruner:
    """The pruner called ``name``.

    Args:
        name: an entry of ``PRUNERS``.
        **options: fields of its class.

    Raises:
        ValueError: an unknown name or option, with a suggestion, or a value that makes no sense.
    """
    cls = PRUNERS[name]
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise ValueError(f"pruner {name!r} has no option {option!r}: {did_you_mean(option, known)}")
    return cls(**options)


__all__ = [
    "PRUNERS",
    "DecoderPruner",
    "EncoderPruner",
    "Evidence",
    "FastV",
    "Kept",
    "Pruner",
    "PyramidDrop",
    "Random",
    "Selection",
    "Stage",
    "Tokens",
    "Uniform",
    "build_pruner",
]
