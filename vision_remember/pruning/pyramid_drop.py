"""PyramidDrop: vision tokens are dropped in stages, half of them each time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vision_remember.pruning.base import (
    DecoderPruner,
    Kept,
    Stage,
    Tokens,
    check_layers,
    check_several,
    check_share,
    mean_attention,
    share_of,
    strongest,
)

_PAPER_LAYERS, _PAPER_DEPTH = (8, 16, 24), 32


@dataclass(frozen=True)
class PyramidDrop(DecoderPruner):
    """PyramidDrop (arXiv 2410.17247).

    Args:
        layers: before which tokens are dropped, by the attention that the same layer is about to pay. None for the
            paper's 8, 16, 24 of 32, scaled to the decoder's depth.
        keep: for each of them, the share of all vision tokens that stays.
    """

    layers: Sequence[int] | None = None
    keep: Sequence[float] = (0.5, 0.25, 0.125)

    source: ClassVar[str] = "arXiv 2410.17247"

    def __post_init__(self) -> None:
        check_several("keep", self.keep)
        if self.layers is not None:
            check_several("layers", self.layers)
        for share in self.keep:
            check_share("keep", share)
        if any(a < b for a, b in itertools.pairwise(self.keep)):
            raise ValueError(f"keep={list(self.keep)}: expected shares that fall, each of all vision tokens")
        if self.layers is not None and len(self.layers) != len(self.keep):
            raise ValueError(f"layers={list(self.layers)}, keep={list(self.keep)}: expected a share for each layer")

    def stages(self, depth: int) -> tuple[Stage, ...]:
        layers = self.layers or [round(layer * depth / _PAPER_DEPTH) for layer in _PAPER_LAYERS][: len(self.keep)]
        check_layers("layers", list(layers), depth, lowest=1)
        if len(layers) != len(self.keep):
            raise ValueError(f"keep={list(self.keep)}: give layers, one for each share")
        return tuple(Stage(layer, attention_of=layer) for layer in layers)

    def choose(self, stage: int, tokens: Tokens) -> Kept:
        counts = share_of(tokens.initial, self.keep[stage])
        return Kept(strongest(mean_attention(tokens), tokens.vision, counts), tokens.hidden)
