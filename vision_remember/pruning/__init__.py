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
from vision_remember.pruning.faster_vlm import FasterVLM
from vision_remember.pruning.fastv import FastV
from vision_remember.pruning.prumerge import PruMerge, PruMergePlus
from vision_remember.pruning.pyramid_drop import PyramidDrop
from vision_remember.pruning.sparse_vlm import SparseVLM
from vision_remember.pruning.tome import ToMe
from vision_remember.pruning.vision_zip import VisionZip
from vision_remember.registry import Registry, did_you_mean

PRUNERS: Registry[type[Pruner]] = Registry(
    "pruner",
    {
        "faster_vlm": FasterVLM,
        "fastv": FastV,
        "prumerge": PruMerge,
        "prumerge_plus": PruMergePlus,
        "pyramid_drop": PyramidDrop,
        "random": Random,
        "sparse_vlm": SparseVLM,
        "tome": ToMe,
        "uniform": Uniform,
        "vision_zip": VisionZip,
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
    "FasterVLM",
    "Kept",
    "PruMerge",
    "PruMergePlus",
    "Pruner",
    "PyramidDrop",
    "Random",
    "Selection",
    "SparseVLM",
    "Stage",
    "ToMe",
    "Tokens",
    "Uniform",
    "VisionZip",
    "build_pruner",
]
