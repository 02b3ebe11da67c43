"""Questions and answers as token streams: many questions behind one image, each blind to the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
PAD, UNK, IMAGE = range(3)
SPECIALS = ("<pad>", "<unk>", "<image>")

# Said in nearly every question and telling none from another.
FILLERS = frozenset(["what", "which", "is", "are", "the", "of", "does", "do", "in", "with", "to", "say", "how"])


class Words:
    """Words and their numbers. "row 3 column 7" is one word, as a tokenizer that had met it often would make it.

    Args:
        vocabulary: The words that questions and answers use.
        grid: Rows and columns that a question can name.
    """

    def __init__(self, vocabulary: Sequence[str], grid: int) -> None:
        self.grid = grid
        cells = [f"row {row} column {column}" for row in range(1, grid + 1) for column in range(1, grid + 1)]
        self.names = (*SPECIALS, *cells, *vocabulary)
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, word: str) -> bool:
        return word in self._numbers

    def number(self, word: str) -> int:
        """The number of a word.

        Raises:
            ValueError: a word that is not in the vocabulary.
        """
        if word not in self._numbers:
            raise ValueError(f"{word!r} is not among the {len(self.names)} words of the vocabulary")
        return self._numbers[word]

    @property
    def first_cell(self) -> int:
        """The number of the word that names the first cell; the others follow in raster order."""
        return len(SPECIALS)

    def question(self, text: str) -> list[int]:
        """A question's tokens, without the words that say nothing."""
        parts = re.split(r"(row \d+ column \d+)", text)
        words = [word for part in parts for word in ([part] if part in self else part.split())]
        return [self.number(word) for word in words if word not in FILLERS]


@dataclass(frozen=True)
class Streams:
    """The questions about N pages, T positions each.

    Attributes:
        tokens: (N, T), question and answer words; PAD where nothing stands.
        branch: (N, T), the number of the question on its page; -1 for padding.
        place: (N, T), position within the question.
        target: (N, T), the answer word that the position predicts, or IGNORE.
    """

    tokens: Tensor
    branch: Tensor
    place: Tensor
    target: Tensor

    def __getitem__(self, index: Tensor | slice) -> Streams:
        return Streams(self.tokens[index], self.branch[index], self.place[index], self.target[index])

    def to(self, device: str) -> Streams:
        """The same on a device."""
        return Streams(*(part.to(device) for part in (self.tokens, self.branch, self.place, self.target)))


def stream(words: Words, questions: Sequence[tuple[str, Sequence[str]]], length: int) -> tuple[list[list[int]], int]:
    """One page's questions in `length` positions.

    Args:
        words: The vocabulary.
        questions: Text and answer words of each.
        length: T.

    Returns:
        Rows tokens, branch, place and target, each of T numbers, and how many questions found room.
    """
    rows: list[list[int]] = [[], [], [], []]
    taken = 0
    for text, answer in questions:
        asked, said = words.question(text), [words.number(word) for word in answer]
        tokens = asked + said[:-1]
        if len(rows[0]) + len(tokens) > length:
            break
        target = [IGNORE] * (len(asked) - 1) + said
        for row, values in zip(rows, (tokens, [taken] * len(tokens), range(len(tokens)), target), strict=True):
            row.extend(values)
        taken += 1
    room = length - len(rows[0])
    fills = (PAD, -1, 0, IGNORE)
    return [row + [fill] * room for row, fill in zip(rows, fills, strict=True)], taken


def masks(streams: Streams, vision_tokens: int, window: int) -> tuple[dict[str, Tensor], Tensor]:
    """What each position sees when the vision tokens stand in front.

    Returns:
        The additive mask (B, 1, S, S) of each kind of decoder layer, S = vision_tokens + T, and positions (B, S): every
        question sees the page and itself, and stands where it would stand if it were alone.
    """
    batch, device = len(streams.tokens), streams.tokens.device
    vision = torch.arange(vision_tokens, device=device).expand(batch, -1)
    positions = torch.cat([vision, vision_tokens + streams.place], dim=1)
    branch = torch.cat([torch.full_like(vision, -2), streams.branch], dim=1)
    distance = positions[:, :, None] - positions[:, None, :]
    seen = (distance >= 0) & ((branch[:, None, :] == -2) | (branch[:, :, None] == branch[:, None, :]))
    # padding positions share a branch and a place: each sees itself at least, and nobody sees them
    lowest = torch.finfo(torch.float32).min
    kinds = {"full_attention": seen, "sliding_attention": seen & (distance < window)}
    zeros = torch.zeros(seen.shape, device=device)
    return {kind: zeros.masked_fill(~what, lowest)[:, None] for kind, what in kinds.items()}, positions
