"""How tokens read features: one file each, listed in one table."""

from __future__ import annotations

import inspect
from typing import Any

from vision_remember.interactions.base import Interaction
from vision_remember.interactions.deepstack import DeepStack
from vision_remember.interactions.deformable import DeformableAttention
from vision_remember.interactions.fusion import FUSIONS, Fusion
from vision_remember.interactions.global_attention import GlobalAttention
from vision_remember.interactions.sela import SELA
from vision_remember.interactions.token_mixer import TokenMixer
from vision_remember.registry import Registry, did_you_mean

INTERACTIONS: Registry[type[Interaction[Any]]] = Registry(
    "interaction",
    {
        "sela": SELA,
        "deformable": DeformableAttention,
        "global": GlobalAttention,
        "deepstack": DeepStack,
    },
)


def build_interaction(name: str, query_dim: int, feature_dim: int, **options: Any) -> Interaction[Any]:
    """Builds the interaction called ``name``.

    Args:
        name: an entry of ``INTERACTIONS``.
        query_dim: D, width of the tokens.
        feature_dim: C, width of the features, all levels joined.
        **options: keyword arguments of the class.

    Raises:
        ValueError: an unknown name or option; the message suggests the closest one.
    """
    known = interaction_options(name)
    for option in options:
        if option not in known:
            raise ValueError(f"interaction {name!r} has no option {option!r}: {did_you_mean(option, known)}")
    return INTERACTIONS[name](query_dim, feature_dim, **options)


def interaction_options(name: str) -> list[str]:
    """The options of the interaction called ``name``."""
    parameters = inspect.signature(INTERACTIONS[name]).parameters
    return [option for option in parameters if option not in ("query_dim", "feature_dim")]


__all__ = [
    "FUSIONS",
    "INTERACTIONS",
    "SELA",
    "DeepStack",
    "DeformableAttention",
    "Fusion",
    "GlobalAttention",
    "Interaction",
    "TokenMixer",
    "build_interaction",
    "interaction_options",
]
