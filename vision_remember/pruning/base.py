"""What every training-free pruner is: an order among an image's tokens, and which of them stay.

Pruners act in one of two places. Those of the decoder read the attention of a decoder layer to the vision tokens and
drop tokens between layers. Those of the encoder decide before the decoder begins, by what the vision encoder attends
to.
All are pure functions of tensors; attaching them to a host is another matter.

One alphabet: B sequences, S positions, D decoder width; T tiles, n tokens of a tile, C feature width; Q queries.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vision_remember.grid import Grid


@dataclass(frozen=True)
class Stage:
    """One place in the decoder where tokens are dropped.

    Attributes:
        layer: the decoder layer before which they are.
        attention_of: the layer whose attention decides; None if none is needed.
    """

    layer: int
    attention_of: int | None = None


@dataclass(frozen=True)
class Tokens:
    """The sequences as they stand in front of a stage.

    Attributes:
        hidden: (B, S, D), the states.
        vision: (B, S), the vision tokens that are still there.
        initial: (B,), how many there were before the first stage.
        attention: (B, heads, Q, S), weights of the queries that the pruner asked for; None if it asked for none.
        counted: (B, Q), which of them are queries, not fillers.
    """

    hidden: Tensor
    vision: Tensor
    initial: Tensor
    attention: Tensor | None = None
    counted: Tensor | None = None


@dataclass(frozen=True)
class Kept:
    """What a stage leaves.

    Attributes:
        vision: (B, S), the vision tokens that stay.
        hidden: (B, S, D), the states; those of tokens that stay may have taken others in.
    """

    vision: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Evidence:
    """What the vision encoder tells of the tokens of tiles.

    Attributes:
        attention: (T, n), attention that each token gets; see :attr:`EncoderPruner.heads`.
        keys: (T, n, heads, d), keys of the attention.
        features: (T, n, C'), what the projector is about to read.
        grid: (h, w) of the n tokens.
    """

    attention: Tensor
    keys: Tensor
    features: Tensor
    grid: Grid


@dataclass(frozen=True)
class Selection:
    """What a pruner of the encoder leaves.

    Attributes:
        keep: (T, n), the tokens that stay.
        features: (T, n, C'), those of tokens that stay may have taken others in.
    """

    keep: Tensor
    features: Tensor


class Pruner(ABC):
    """Base of all pruners; a subclass is a frozen dataclass whose fields are its options."""

    where: ClassVar[Literal["decoder", "encoder"]]
    source: ClassVar[str]
    """The paper."""

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


class DecoderPruner(Pruner):
    """Drops vision tokens between decoder layers."""

    where = "decoder"
    reads_prompt: ClassVar[bool] = True
    """Whether the choice depends on the text behind the images, so that none of it can be taken back."""

    @abstractmethod
    def stages(self, depth: int) -> tuple[Stage, ...]:
        """Where tokens are dropped in a decoder of ``depth`` layers, in order.

        Raises:
            ValueError: the options ask for a layer that it does not have.
        """

    def queries(self, embeddings: Tensor, vision: Tensor, real: Tensor) -> Tensor:
        """(B, S) bool, whose attention decides: by default that of the last token, which is about to answer.

        Args:
            embeddings: (B, S, D), the states in front of the first layer.
            vision: (B, S), where vision tokens stand.
            real: (B, S), what is not padding.
        """
        return last_of(real)

    @abstractmethod
    def choose(self, stage: int, tokens: Tokens) -> Kept:
        """What stays after the stage of this number."""


class EncoderPruner(Pruner):
    """Chooses among the tokens of each tile before the decoder begins."""

    where = "encoder"
    heads: ClassVar[bool] = True
    """Whether the encoder's attention is a softmax for each head, averaged; otherwise one over the full width."""
    needs_cls: ClassVar[bool] = False
    """Whether it is the attention of a CLS token; otherwise, where there is none, that of all tokens will do."""

    @abstractmethod
    def select(self, evidence: Evidence) -> Selection:
        """What stays of each tile."""

    @abstractmethod
    def check(self, tokens: int) -> None:
        """Raises ValueError if the options do not fit tiles of so many tokens."""


def last_of(members: Tensor) -> Tensor:
    """(B, S) bool -> (B, S) bool, the last member of each row."""
    return members & (members.flip(1).cumsum(1).flip(1) == 1)


def strongest(scores: Tensor, members: Tensor, counts: Tensor) -> Tensor:
    """(B, S) bool, of each row's members those with the highest scores; of equals the first.

    Args:
        scores: (B, S).
        members: (B, S) bool.
        counts: (B,), how many.
    """
    order = scores.float().masked_fill(~members, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return members & (ranks < counts[:, None])


def share_of(total: Tensor, share: float) -> Tensor:
    """(B,) numbers of tokens, rounded as Python rounds; at least one where there are any."""
    return (total.double() * share).round().long().clamp(min=1).minimum(total)


def mean_attention(tokens: Tokens) -> Tensor:
    """(B, S), the attention to each position, averaged over heads and queries."""
    assert tokens.attention is not None
    assert tokens.counted is not None
    counted = tokens.counted[:, None, :, None].to(tokens.attention.dtype)
    summed = (tokens.attention * counted).sum(2).mean(1)
    return summed / counted.sum((1, 2)).clamp(min=1)


def tokens_kept(keep: float, tokens: int, name: str = "keep") -> int:
    """How many of a tile's tokens ``keep`` means: a share below 1, or a number.

    Raises:
        ValueError: more than there are.
    """
    count = max(1, round(keep * tokens)) if isinstance(keep, float) and keep < 1 else int(keep)
    if count > tokens:
        raise ValueError(f"{name}={keep}: a tile of this host has {tokens} tokens")
    return count


def check_share(name: str, value: Any, meaning: str = "the share of vision tokens that stay") -> None:
    """Raises ValueError, which says what was expected, unless it is a number above 0 and up to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r}: expected {meaning}, above 0 and up to 1")


def check_number(name: str, value: Any) -> None:
    """Raises ValueError unless it is a share below 1 or a whole number of tokens from 1."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not whole and not (isinstance(value, float) and 0 < value < 1):
        raise ValueError(f"{name}={value!r}: expected a share of a tile's tokens between 0 and 1, or their number")


def check_several(name: str, values: Any) -> None:
    """Raises ValueError unless it is a sequence."""
    if not isinstance(values, Sequence):
        raise ValueError(f"{name}={values!r}: expected several, one for each stage")


def check_layers(name: str, layers: Sequence[int], depth: int, lowest: int) -> None:
    """Raises ValueError unless the layers are whole numbers that rise, and the decoder has them."""
    rising = all(type(layer) is int for layer in layers) and all(a < b for a, b in itertools.pairwise(layers))
    if not layers or not rising or layers[0] < lowest or layers[-1] >= depth:
        raise ValueError(f"{name}={list(layers)}: expected rising layers from {lowest} to {depth - 1} of this decoder")
