"""Controls: what pruning costs when nothing decides which tokens stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vision_remember.pruning.base import (
    DecoderPruner,
    Kept,
    Stage,
    Tokens,
    check_layers,
    check_share,
    share_of,
    strongest,
)


@dataclass(frozen=True)
class Control(DecoderPruner):
    """Drops vision tokens once, without looking at anything.

    Args:
        keep: share of the vision tokens that stays.
        layer: the decoder layer before which the others are dropped; 0 takes them out before the decoder begins.
    """

    keep: float = 0.5
    layer: int = 0

    source: ClassVar[str] = "control"
    reads_prompt = False

    def __post_init__(self) -> None:
        check_share("keep", self.keep)

    def stages(self, depth: int) -> tuple[Stage, ...]:
        check_layers("layer", [self.layer], depth, lowest=0)
        return (Stage(self.layer),)


@dataclass(frozen=True)
class Random(Control):
    """Vision tokens drawn at random.

    What is drawn depends on the seed and the number of a sequence's vision tokens alone, not on the batch around it.

    Args:
        keep: share of the vision tokens that stays.
        layer: the decoder layer before which the others are dropped; 0 takes them out before the decoder begins.
        seed: of the draw.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}: expected a whole number")

    def choose(self, stage: int, tokens: Tokens) -> Kept:
        scores = torch.zeros(tokens.vision.shape)
        for row, vision in enumerate(tokens.vision.cpu()):
            generator = torch.Generator().manual_seed(self.seed)
            scores[row, vision] = torch.rand(int(vision.sum()), generator=generator)
        counts = share_of(tokens.initial, self.keep)
        return Kept(strongest(scores.to(tokens.vision.device), tokens.vision, counts), tokens.hidden)


@dataclass(frozen=True)
class Uniform(Control):
    """Every so many-th vision token of each sequence.

    Args:
        keep: share of the vision tokens that stays.
        layer: the decoder layer before which the others are dropped; 0 takes them out before the decoder begins.
    """

    def choose(self, stage: int, tokens: Tokens) -> Kept:
        return Kept(evenly(tokens.vision, share_of(tokens.initial, self.keep)), tokens.hidden)


def evenly(members: Tensor, counts: Tensor) -> Tensor:
    """(B, S) bool, ``counts`` (B,) of each row's members at equal distances, the first among them."""
    total = members.sum(1, keepdim=True).clamp(min=1)
    number, counts = members.cumsum(1) - 1, counts[:, None]
    # Of k among n, member i stays where floor(i * k / n) rises: exactly k of them.
    rises = (number * counts) // total != ((number - 1) * counts).div(total, rounding_mode="floor")
    return members & rises
