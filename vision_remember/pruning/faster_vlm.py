"""FasterVLM: the tokens that the vision encoder's CLS token looks at most stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vision_remember.pruning.base import (
    EncoderPruner,
    Evidence,
    Selection,
    check_number,
    strongest,
    tokens_kept,
)


@dataclass(frozen=True)
class FasterVLM(EncoderPruner):
    """FasterVLM ([CLS] Attention is All You Need, arXiv 2412.01818).

    Args:
        keep: tokens of each tile that stay: their share, or their number.
    """

    keep: float = 0.25

    source: ClassVar[str] = "arXiv 2412.01818"

    def __post_init__(self) -> None:
        check_number("keep", self.keep)

    def check(self, tokens: int) -> None:
        tokens_kept(self.keep, tokens)

    def select(self, evidence: Evidence) -> Selection:
        scores = evidence.attention
        counts = torch.full((len(scores),), tokens_kept(self.keep, scores.shape[1]), device=scores.device)
        return Selection(strongest(scores, torch.ones_like(scores, dtype=torch.bool), counts), evidence.features)
