"""VisionZip: the tokens that stand out stay, and the others are merged into a few that stand for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from vision_remember.pruning.base import (
    EncoderPruner,
    Evidence,
    Selection,
    check_number,
    strongest,
    tokens_kept,
)


@dataclass(frozen=True)
class VisionZip(EncoderPruner):
    """VisionZip (Longer is Better but Not Necessary in Vision Language Models, arXiv 2412.04467).

    A contextual token is its target plus the mean of the tokens that are most like it, by their keys; targets lie at
    equal distances among what is not dominant. Each stays at its own place.

    Args:
        dominant: tokens of each tile that stay as they are: their share, or their number. The published code counts the
            CLS token among them, which has no place in the decoder here.
        contextual: tokens of each tile that take the others in.
    """

    dominant: float = 54
    contextual: float = 10

    source: ClassVar[str] = "arXiv 2412.04467"

    def __post_init__(self) -> None:
        check_number("dominant", self.dominant)
        check_number("contextual", self.contextual)

    def check(self, tokens: int) -> None:
        dominant, contextual = self._counts(tokens)
        if dominant + contextual > tokens:
            raise ValueError(
                f"dominant={self.dominant}, contextual={self.contextual}: {dominant + contextual} tokens, but a tile "
                f"of this host has {tokens}; give less of either, as shares below 1 for tiles of any size"
            )

    def select(self, evidence: Evidence) -> Selection:
        scores, features = evidence.attention, evidence.features
        tiles, count = scores.shape
        dominant, contextual = self._counts(count)
        keep = strongest(
            scores, torch.ones_like(scores, dtype=torch.bool), torch.full((tiles,), dominant, device=scores.device)
        )
        # Of equal length in every tile, and in raster order.
        rest = (~keep).nonzero()[:, 1].view(tiles, count - dominant)
        chosen = torch.zeros(rest.shape[1], dtype=torch.bool, device=scores.device)
        chosen[:: max(1, rest.shape[1] // contextual)][:contextual] = True
        targets, others = rest[:, chosen], rest[:, ~chosen]
        metric = F.normalize(evidence.keys.mean(2).float(), dim=-1)
        nearest = (_take(metric, others) @ _take(metric, targets).transpose(1, 2)).argmax(-1)
        shares = F.one_hot(nearest, targets.shape[1]).to(features.dtype)
        counts = shares.sum(1).clamp(min=1)[..., None]
        merged = _take(features, targets) + shares.transpose(1, 2) @ _take(features, others) / counts
        wide = targets[..., None].expand_as(merged)
        return Selection(keep.scatter(1, targets, True), features.scatter(1, wide, merged))

    def _counts(self, tokens: int) -> tuple[int, int]:
        return (
            tokens_kept(self.dominant, tokens, "dominant"),
            tokens_kept(self.contextual, tokens, "contextual"),
        )


def _take(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(T, n, C) and (T, k) -> (T, k, C)."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))
