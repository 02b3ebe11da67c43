"""What one forward pass carries from the vision encoder to the decoder layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from vision_remember.grid import Grid
from vision_remember.layout import VisionLayout


@dataclass(frozen=True)
class VisionMemory:
    """The features of the tiles of one call.

    Attributes:
        features: (T, H*W, C), raster order, the levels joined on channels.
        saliency: (T, H*W), or None.
        feature_grid: (H, W).
        token_grid: (h, w), the grid of the vision tokens that stand for a tile.
    """

    features: Tensor
    saliency: Tensor | None
    feature_grid: Grid
    token_grid: Grid

    def take(self, tiles: list[int]) -> VisionMemory:
        """The memory of these tiles, in this order, which may repeat some (beams) or leave some out."""
        if tiles == list(range(len(self.features))):
            return self
        saliency = None if self.saliency is None else self.saliency[tiles]
        return replace(self, features=self.features[tiles], saliency=saliency)


@dataclass(frozen=True)
class Recall:
    """A memory and where its tokens stand in the sequences of one decoder call."""

    memory: VisionMemory
    layout: VisionLayout

    def through(self, block: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D), the vision tokens replaced by what ``block`` makes of them.

        Args:
            block: called as :meth:`vision_remember.VisionRemember.forward` is.
            hidden: the residual stream. Its device decides where the work is done.
        """
        memory = self.memory
        tokens = block(
            self.layout.gather(hidden),
            memory.features.to(hidden.device),
            token_grid=memory.token_grid,
            feature_grid=memory.feature_grid,
            saliency=None if memory.saliency is None else memory.saliency.to(hidden.device),
        )
        return self.layout.scatter(hidden, tokens)
