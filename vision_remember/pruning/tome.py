"""ToMe: tokens of the vision encoder that are alike are merged between its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_remember.pruning.base import Pruner, check_number, tokens_kept


@dataclass(frozen=True)
class ToMe(Pruner):
    """Token Merging (Your ViT But Faster, arXiv 2210.09461), for an encoder whose tokens a decoder then reads.

    Args:
        keep: tokens of each tile that are left in front of the decoder: their share, or their number. As many are
            merged between any two blocks.
        proportional: attention counts a merged token as often as it has members. That puts a bias on the logits, which
            takes the encoder off flash attention.
    """

    keep: float = 0.5
    proportional: bool = True

    where = "encoder"
    source: ClassVar[str] = "arXiv 2210.09461"

    def __post_init__(self) -> None:
        check_number("keep", self.keep)

    def merges(self, tokens: int, blocks: int) -> list[int]:
        """How many tokens are merged in front of each of the blocks but the first.

        Args:
            tokens: n of a tile.
            blocks: up to the features.

        Raises:
            ValueError: more than half of the tokens would have to be merged at once.
        """
        gone, times = tokens - tokens_kept(self.keep, tokens), blocks - 1
        if gone and times < 1:
            raise ValueError(
                f"the features come from block {blocks}: tokens are merged between blocks, and there is none"
            )
        numbers = [gone // times + (number < gone % times) for number in range(times)] if times else []
        left = tokens
        for number in numbers:
            if number > left // 2:
                raise ValueError(
                    f"keep={self.keep}: {gone} of {tokens} tokens would have to be merged between {blocks} blocks, and "
                    "no more than half of those that are left can be merged at once"
                )
            left -= number
        return numbers


@dataclass(frozen=True)
class Merged:
    """Tokens some of which stand for several.

    Attributes:
        source: (T, n), for each of the first tokens the one that it is part of now.
        sizes: (T, m), how many each of the tokens stands for.
        places: (T, m), the first token at whose place it stands.
    """

    source: Tensor
    sizes: Tensor
    places: Tensor

    @classmethod
    def nothing(cls, tiles: int, tokens: int, device: torch.device) -> Merged:
        """Each token for itself."""
        each = torch.arange(tokens, device=device).expand(tiles, -1)
        return cls(each, torch.ones(tiles, tokens, device=device), each)

    def unmerged(self, hidden: Tensor) -> Tensor:
        """(T, m, C) -> (T, n, C), each of the first tokens in the state of that which it is part of."""
        return hidden.gather(1, self.source[..., None].expand(-1, -1, hidden.shape[-1]))


def merge(hidden: Tensor, metric: Tensor, before: Merged, count: int, prefix: int) -> tuple[Tensor, Merged]:
    """(T, m, C) -> (T, m - count, C): every other token may join the one most like it among those between.

    Args:
        hidden: the tokens.
        metric: (T, m, d), by which they are alike.
        before: what they stand for.
        count: how many join another.
        prefix: tokens in front that are left alone.
    """
    tiles, tokens, _ = hidden.shape
    device = hidden.device
    each = torch.arange(tokens, device=device)
    joining, staying = (half[half >= prefix] for half in (each[::2], each[1::2]))
    metric = F.normalize(metric.float(), dim=-1)
    best, target = (metric[:, joining] @ metric[:, staying].transpose(1, 2)).max(-1)
    order = best.argsort(dim=1, descending=True, stable=True)[:, :count]
    gone, taking = joining[order], staying[target.gather(1, order)]
    weights = before.sizes[..., None].to(hidden.dtype)
    wide = taking[..., None].expand(-1, -1, hidden.shape[-1])
    summed = (hidden * weights).scatter_add(1, wide, (hidden * weights).gather(1, gone[..., None].expand_as(wide)))
    sizes = before.sizes.scatter_add(1, taking, before.sizes.gather(1, gone))
    left = torch.ones(tiles, tokens, dtype=torch.bool, device=device).scatter(1, gone, False)
    stay = left.nonzero()[:, 1].view(tiles, tokens - count)
    number = left.cumsum(1) - 1
    moved = number.scatter(1, gone, number.gather(1, taking))
    states = summed / sizes[..., None].to(hidden.dtype)
    return states.gather(1, stay[..., None].expand(-1, -1, hidden.shape[-1])), Merged(
        moved.gather(1, before.source), sizes.gather(1, stay), before.places.gather(1, stay)
    )
