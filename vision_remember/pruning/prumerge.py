"""PruMerge: outliers of the CLS token's attention stay, and take in the tokens that are like them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import check_count
from vision_remember.pruning.base import EncoderPruner, Evidence, Selection, check_number, strongest, tokens_kept


@dataclass(frozen=True)
class PruMerge(EncoderPruner):
    """LLaVA-PruMerge (arXiv 2403.15388).

    How many tokens of a tile stay follows from the tile: those whose attention lies above the third quartile by more
    than one and a half times the distance of the quartiles, at least one. Each then takes in the tokens with the
    nearest keys, weighted by their attention, and one more token is the weighted sum of all that were dropped; it
    stands where the most attended of them stood.

    Args:
        keep: tokens of each tile that stay instead: their share, or their number. None adapts.
        neighbours: how many tokens each takes in.
    """

    keep: float | None = None
    neighbours: int = 32

    source: ClassVar[str] = "arXiv 2403.15388"
    heads = False
    needs_cls = True
    spread: ClassVar[bool] = False
    """Whether tokens at equal distances stay too."""

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_number("keep", self.keep)
        check_count("neighbours", self.neighbours, lowest=0)

    def check(self, tokens: int) -> None:
        if self.keep is not None:
            tokens_kept(self.keep, tokens)

    def select(self, evidence: Evidence) -> Selection:
        scores, features = evidence.attention.float(), evidence.features
        everything = torch.ones_like(scores, dtype=torch.bool)
        if self.keep is None:
            counts = outliers(scores).clamp(min=1)
        else:
            counts = torch.full_like(scores[:, 0], tokens_kept(self.keep, scores.shape[1])).long()
        keep = strongest(scores, everything, counts)
        if self.spread:
            keep = keep | _spread(counts, scores)
        merged = features + self._near(evidence.keys.flatten(2).float(), scores).to(features.dtype) @ features
        dropped = ~keep
        extra = ((scores * dropped).to(features.dtype)[:, None] @ features).expand_as(features)
        place = strongest(scores, dropped, torch.ones_like(counts))
        features = merged.where(keep[..., None], features)
        return Selection(keep | place, extra.where(place[..., None], features))

    def _near(self, keys: Tensor, scores: Tensor) -> Tensor:
        """(T, n, n), for each token the attention to its nearest others, zero for all further ones."""
        keys = F.normalize(keys, dim=-1)
        likeness = keys @ keys.transpose(1, 2)
        likeness.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        count = min(self.neighbours, likeness.shape[2] - 1)
        nearest = likeness.argsort(dim=2, descending=True, stable=True)[..., :count]
        weights = scores[:, None].expand_as(likeness)
        return torch.zeros_like(weights).scatter(2, nearest, weights.gather(2, nearest))


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge+ (arXiv 2403.15388): besides, every so many-th token stays, about three for each outlier."""

    spread = True


def outliers(scores: Tensor) -> Tensor:
    """(T, n) -> (T,), how many values lie above the upper fence of a box plot."""
    low, high = scores.quantile(0.25, dim=1, keepdim=True), scores.quantile(0.75, dim=1, keepdim=True)
    return (scores > high + 1.5 * (high - low)).sum(1)


def _spread(counts: Tensor, scores: Tensor) -> Tensor:
    """(T, n) bool, tokens at equal distances: a third of the distance at which there would be as many as ``counts``."""
    total = scores.shape[1]
    step = (total // counts // 3).clamp(min=1)
    return torch.arange(total, device=scores.device) % step[:, None] == 0
