"""How several encoder levels become what an interaction reads: one small class each, listed in one table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.interactions.levels import (
    FeatureNorm,
    Features,
    LevelLinear,
    LevelNorm,
    LevelStack,
    projected,
    split_levels,
)
from vision_remember.registry import Registry


class Fusion(nn.Module):
    """Base of all fusions: norms the levels. A subclass may override :meth:`fuse`, ``out_dims`` and :meth:`linear`.

    Args:
        level_dims: c of each level.
        feature_norm: layer norm over each level's channels, over those of all levels ("joint"), or none.

    Attributes:
        out_dims: widths of the levels that come out.
        key_levels: keys per cell in what :meth:`linear`'s modules make.

    Raises:
        ValueError: an unknown norm, or levels that cannot be fused so.
    """

    def __init__(self, level_dims: Sequence[int], feature_norm: FeatureNorm) -> None:
        super().__init__()
        self.level_dims = self.out_dims = tuple(level_dims)
        self.key_levels = 1
        self.norm = LevelNorm(level_dims, feature_norm)

    def forward(self, features: Features, *, normed: bool = False) -> Features:
        """Levels of widths ``level_dims`` -> levels of widths ``out_dims``; joined or not, in and out.

        Args:
            features: the levels.
            normed: whether they went through ``norm`` already.
        """
        return self.fuse(features if normed else self.norm(features))

    def fuse(self, features: Features) -> Features:
        """:meth:`forward` behind the norm. By a call of the module alone: what brings its weights is hooked to that."""
        return features

    def linear(self, out_dim: int) -> nn.Module:
        """A projection of what comes out: keys or values, (B, key_levels*H*W, out_dim). No bias."""
        return LevelLinear(sum(self.out_dims), out_dim, bias=False)


class Concat(Fusion):
    """The levels joined on channels (Vision Remember, section 4.3): a cell is one key, made of all its levels."""


class Mix(Fusion):
    """A weighted mean of the levels, channel by channel; the softmax of learned logits weighs, from equal weights on.

    A third of the keys' and values' parameters with three levels. Our own; the idea is that of ELMo (arXiv 1802.05365,
    eq. 1), whose scale the projections behind it absorb.
    """

    def __init__(self, level_dims: Sequence[int], feature_norm: FeatureNorm) -> None:
        super().__init__(level_dims, feature_norm)
        if len(set(level_dims)) > 1:
            raise ValueError(f"level_dims={list(level_dims)}: fusion 'mix' needs levels of one width")
        self.out_dims = self.level_dims[:1]
        self.logits = nn.Parameter(torch.zeros(len(self.level_dims), self.level_dims[0]))

    def fuse(self, features: Features) -> Tensor:
        """Levels -> (B, H*W, c)."""
        levels = split_levels(features, self.level_dims)
        shares = self.logits.softmax(0).to(levels[0].dtype)
        total = levels[0] * shares[0]
        for level, share in zip(levels[1:], shares[1:], strict=True):
            total = torch.addcmul(total, level, share)
        return total


class MBTF(Fusion):
    """Multi-block token fusion (LLaVA-STF, arXiv 2506.07138): an MLP on each cell's levels, down to one level.

    Linear, GELU, Linear, of widths 4c and c for the widest level's c: the release's own, where eight levels make 8c. It
    has no norm: that is ``feature_norm="none"`` here.
    """

    def __init__(self, level_dims: Sequence[int], feature_norm: FeatureNorm) -> None:
        super().__init__(level_dims, feature_norm)
        width = max(self.level_dims)
        self.out_dims = (width,)
        self.vr_in = LevelLinear(sum(self.level_dims), 4 * width)
        self.vr_out = nn.Linear(4 * width, width)

    def fuse(self, features: Features) -> Tensor:
        """Levels -> (B, H*W, c)."""
        hidden: Tensor = self.vr_out(F.gelu(projected(self.vr_in, features)))
        return hidden


class Tokens(Fusion):
    """The levels joined on the axis of cells: each level of a cell is a key of its own, with a projection of its own.

    One softmax runs over all levels of the cells that a token sees, so a head may read one level and leave the others.
    """

    def __init__(self, level_dims: Sequence[int], feature_norm: FeatureNorm) -> None:
        super().__init__(level_dims, feature_norm)
        self.key_levels = len(self.level_dims)

    def linear(self, out_dim: int) -> nn.Module:
        """A projection of each level; see :meth:`Fusion.linear`."""
        return LevelStack(self.out_dims, out_dim)


FUSIONS: Registry[type[Fusion]] = Registry(
    "fusion",
    {
        "concat": Concat,
        "mbtf": MBTF,
        "mix": Mix,
        "tokens": Tokens,
    },
)
