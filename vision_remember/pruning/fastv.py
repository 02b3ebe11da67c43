"""FastV: after a few layers, the vision tokens that the last token looks at least are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vision_remember.pruning.base import (
    DecoderPruner,
    Kept,
    Stage,
    Tokens,
    check_layers,
    check_share,
    mean_attention,
    share_of,
    strongest,
)


@dataclass(frozen=True)
class FastV(DecoderPruner):
    """FastV (An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764).

    The text speaks of the attention that a token receives on average, the code takes the last token's; so do we.

    Args:
        layer: K, the layer before which tokens are dropped, by the attention of the layer in front of it.
        keep: share of the vision tokens that stays, 1 - R.
    """

    layer: int = 2
    keep: float = 0.5

    source: ClassVar[str] = "arXiv 2403.06764"

    def __post_init__(self) -> None:
        check_share("keep", self.keep)

    def stages(self, depth: int) -> tuple[Stage, ...]:
        check_layers("layer", [self.layer], depth, lowest=1)
        return (Stage(self.layer, attention_of=self.layer - 1),)

    def choose(self, stage: int, tokens: Tokens) -> Kept:
        counts = share_of(tokens.initial, self.keep)
        return Kept(strongest(mean_attention(tokens), tokens.vision, counts), tokens.hidden)
