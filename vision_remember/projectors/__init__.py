"""Projectors: one file each, listed in one table."""

from __future__ import annotations

import inspect
from typing import Any

from vision_remember.grid import Grid
from vision_remember.projectors.adaptive_avg_pool import AdaptiveAvgPool
from vision_remember.projectors.base import Projector
from vision_remember.projectors.c_abstractor import CAbstractor
from vision_remember.projectors.d_abstractor import DAbstractor
from vision_remember.projectors.deformable_pool import DeformablePool
from vision_remember.projectors.honeybee_resampler import HoneybeeResampler
from vision_remember.projectors.ldp import LDP, LDPv2
from vision_remember.projectors.matryoshka import Matryoshka
from vision_remember.projectors.mlp import MLP
from vision_remember.projectors.pixel_shuffle import PixelShuffle
from vision_remember.projectors.qformer import QFormer
from vision_remember.projectors.quecc import QueCC
from vision_remember.projectors.resampler import Resampler
from vision_remember.projectors.stf import STF
from vision_remember.projectors.token_packer import TokenPacker
from vision_remember.registry import Registry, did_you_mean

PROJECTORS: Registry[type[Projector]] = Registry(
    "projector",
    {
        "adaptive_avg_pool": AdaptiveAvgPool,
        "c_abstractor": CAbstractor,
        "d_abstractor": DAbstractor,
        "deformable_pool": DeformablePool,
        "honeybee_resampler": HoneybeeResampler,
        "ldp": LDP,
        "ldpv2": LDPv2,
        "matryoshka": Matryoshka,
        "mlp": MLP,
        "pixel_shuffle": PixelShuffle,
        "qformer": QFormer,
        "quecc": QueCC,
        "resampler": Resampler,
        "stf": STF,
        "token_packer": TokenPacker,
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


__all__ = [
    "LDP",
    "MLP",
    "PROJECTORS",
    "STF",
    "AdaptiveAvgPool",
    "CAbstractor",
    "DAbstractor",
    "DeformablePool",
    "HoneybeeResampler",
    "LDPv2",
    "Matryoshka",
    "PixelShuffle",
    "Projector",
    "QFormer",
    "QueCC",
    "Resampler",
    "TokenPacker",
    "build_projector",
    "projector_name",
]
