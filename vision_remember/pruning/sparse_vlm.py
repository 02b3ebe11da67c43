"""SparseVLM: the words that the image concerns rate its tokens; how many go follows from how the ratings repeat."""

from __future__ import annotations

from collections.abc import Sequence
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
    check_several,
    check_share,
    last_of,
    mean_attention,
    strongest,
)

_PAPER_LAYERS, _PAPER_DEPTH = (2, 6, 15), 32
_DENSITY_NEIGHBOURS = 5


@dataclass(frozen=True)
class SparseVLM(DecoderPruner):
    """SparseVLM (arXiv 2410.04417).

    Raters are the text tokens behind the last image whose likeness to the vision tokens, in the embeddings, is above
    average. In each of ``layers`` the vision tokens are rated by the attention of the raters; of n vision tokens
    ``strength * (n - rank)`` are dropped, where the rank is that of the raters' attention to them. The best rated of
    the dropped are recycled: gathered into clusters by their density, and each cluster is one token again, at the place
    of its centre.

    Args:
        layers: whose attention rates; tokens are dropped behind each. None for the published 2, 6, 15 of 32, scaled to
            the decoder's depth.
        strength: the paper's factor lambda, for which it gives no value.
        recycled: share of the dropped tokens that is recycled.
        clusters: clusters for each recycled token.
    """

    layers: Sequence[int] | None = None
    strength: float = 0.5
    recycled: float = 0.3
    clusters: float = 0.1

    source: ClassVar[str] = "arXiv 2410.04417"

    def __post_init__(self) -> None:
        if self.layers is not None:
            check_several("layers", self.layers)
        check_share("strength", self.strength, "how much of (tokens - rank) is dropped")
        check_share("clusters", self.clusters, "the number of clusters for each recycled token")
        if not isinstance(self.recycled, (int, float)) or not 0 <= self.recycled < 1:
            raise ValueError(f"recycled={self.recycled!r}: expected a share of the dropped tokens from 0, below 1")

    def stages(self, depth: int) -> tuple[Stage, ...]:
        scaled = sorted({round(layer * depth / _PAPER_DEPTH) for layer in _PAPER_LAYERS})
        layers = list(self.layers) if self.layers is not None else scaled
        check_layers("layers", layers, depth - 1, lowest=0)
        return tuple(Stage(layer + 1, attention_of=layer) for layer in layers)

    def queries(self, embeddings: Tensor, vision: Tensor, real: Tensor) -> Tensor:
        text = real & ~vision & (vision.flip(1).cumsum(1).flip(1) == 0)
        # (B, S, S) would be large: the softmax over text is taken of each sample's own tokens.
        raters = torch.zeros_like(text)
        for row, (states, seen, words) in enumerate(zip(embeddings.float(), vision, text, strict=True)):
            if not bool(seen.any()) or not bool(words.any()):
                continue
            likeness = (states[seen] @ states[words].T).softmax(-1).mean(0)
            raters[row, words] = likeness > likeness.mean()
        # Where all are alike no word stands out, and the last token rates.
        return torch.where(raters.any(1, keepdim=True), raters, last_of(real))

    def choose(self, stage: int, tokens: Tokens) -> Kept:
        scores = mean_attention(tokens)
        assert tokens.attention is not None
        assert tokens.counted is not None
        counts, ratings = tokens.vision.sum(1), tokens.attention.mean(1)
        ratings = ratings.to(torch.promote_types(ratings.dtype, torch.float32))  # half precision has no rank
        for row, (seen, asked) in enumerate(zip(tokens.vision, tokens.counted, strict=True)):
            if bool(seen.any()):
                rank = torch.linalg.matrix_rank(ratings[row][asked][:, seen])
                counts[row] -= (self.strength * (counts[row] - rank)).long()
        kept = strongest(scores, tokens.vision, counts)
        return self._recycled(tokens, scores, kept)

    def _recycled(self, tokens: Tokens, scores: Tensor, kept: Tensor) -> Kept:
        """What was kept, and one token for each cluster of the best rated others."""
        dropped = tokens.vision & ~kept
        again = strongest(scores, dropped, (dropped.sum(1) * self.recycled).long())
        hidden = tokens.hidden.clone()
        for row, members in enumerate(again):
            places = members.nonzero()[:, 0]
            count = min(len(places), max(1, int(len(places) * self.clusters)))
            if count == 0:
                continue
            states = tokens.hidden[row, places]
            centres, nearest = density_clusters(states, count)
            summed = torch.zeros_like(states[:count]).index_add(0, nearest, states)
            sizes = torch.bincount(nearest, minlength=count)[:, None].to(states.dtype)
            hidden[row, places[centres]] = summed / sizes
            kept = kept.clone()
            kept[row, places[centres]] = True
        return Kept(kept, hidden)


def density_clusters(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(count,) centres among (n, D) states, and (n,) the centre that each belongs to.

    A centre lies in a dense place, far from any denser one (density peaks, Rodriguez and Laio 2014, with densities from
    the nearest neighbours). Of equals the first is taken, so nothing depends on chance.
    """
    distances = torch.cdist(states.float(), states.float()) / states.shape[1] ** 0.5
    near = distances.topk(min(_DENSITY_NEIGHBOURS, len(states)), largest=False).values
    density = (-near.square().mean(1)).exp()
    denser = density[None] > density[:, None]
    apart = distances.masked_fill(~denser, torch.inf).amin(1)
    apart = apart.where(apart.isfinite(), distances.max())
    centres = (apart * density).argsort(descending=True, stable=True)[:count]
    nearest = distances[:, centres].argmin(1)
    nearest[centres] = torch.arange(count, device=states.device)
    return centres, nearest
