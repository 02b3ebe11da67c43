"""Writing a symbolic page, and reading one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vision_remember.synth.labels import BLANK, INDEX, LABELS

T = TypeVar("T")

LEVELS = ("coarse", "medium", "fine")
SPLITS = ("train", "test")


class Draw:
    """A stream of random draws that is the same on every machine.

    Only ``random.Random.random`` is used: the one method whose values Python promises to keep between versions.
    """

    def __init__(self, *key: object) -> None:
        digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
        self.random = random.Random(int.from_bytes(digest, "big")).random

    def below(self, count: int) -> int:
        """A whole number in 0..count-1."""
        return int(self.random() * count)

    def between(self, low: int, high: int) -> int:
        """A whole number in low..high, both included."""
        return low + int(self.random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different items in random order."""
        pool = list(items)
        for place in range(count):
            other = place + int(self.random() * (len(pool) - place))
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.sample(items, len(items))


@dataclass
class Page:
    """A page while it is drawn: a square of cells, each with one label.

    Content stands on slots: 2 x 2 cells at level ``coarse``, one cell otherwise. Text has its own columns, half as wide
    at level ``fine``.

    Attributes:
        cell: pixels along the side of a cell.
        split: whose photographs and handwriting may be used.
        labels: (grid, grid).
        photo: name of the photograph behind the cells and the crop's top left corner, or None for plain paper.
    """

    grid: int
    cell: int
    level: str
    split: str
    labels: NDArray[np.int16] = field(init=False)
    photo: tuple[str, int, int] | None = None

    def __post_init__(self) -> None:
        self.labels = np.zeros((self.grid, self.grid), np.int16)

    @property
    def unit(self) -> int:
        """Cells along the side of a slot."""
        return 2 if self.level == "coarse" else 1

    @property
    def slots(self) -> int:
        """Slots along the side of the page."""
        return self.grid // self.unit

    @property
    def columns(self) -> int:
        """Columns of text; there are as many rows as slots."""
        return self.grid * 2 if self.level == "fine" else self.slots

    def put(self, row: int, column: int, name: str) -> None:
        """Fills a slot."""
        unit, row, column = self.unit, row * self.unit, column * self.unit
        self.labels[row : row + unit, column : column + unit] = INDEX[name]

    def put_cells(self, row: int, column: int, height: int, width: int, name: str) -> None:
        """Fills a rectangle of cells."""
        self.labels[row : row + height, column : column + width] = INDEX[name]

    def write(self, row: int, column: int, text: Sequence[str]) -> None:
        """Writes characters from a row and column of text to the right."""
        for place, character in enumerate(text, start=column):
            if self.level != "fine":
                self.put(row, place, character)
                continue
            under = LABELS[self.labels[row, place // 2]]
            halves = under.split("+") if "+" in under else ["", ""]
            halves[place % 2] = character
            self.labels[row, place // 2] = INDEX["+".join(halves)]


@dataclass(frozen=True)
class Sheet:
    """A page as its labels tell it, for the oracles.

    Attributes:
        labels: (grid, grid).
    """

    labels: NDArray[np.int16]
    level: str

    @cached_property
    def cells(self) -> list[list[str]]:
        """What each cell holds."""
        return [[LABELS[index] for index in row] for row in self.labels.tolist()]

    @cached_property
    def slots(self) -> list[list[str]]:
        """What each slot holds; at level ``coarse``, what its first cell holds."""
        step = 2 if self.level == "coarse" else 1
        return [[LABELS[index] for index in row] for row in self.labels[::step, ::step].tolist()]

    @cached_property
    def text(self) -> list[list[str]]:
        """The characters at each row and column of text; what is no character is ``blank`` or its label."""
        if self.level != "fine":
            return self.slots
        return [
            [half or BLANK for name in row for half in (name.split("+") if "+" in name else (name, name))]
            for row in self.slots
        ]

    def filled(self) -> Iterator[tuple[int, int, str]]:
        """Row, column and content of every slot that is not blank."""
        for row, names in enumerate(self.slots):
            for column, name in enumerate(names):
                if name != BLANK:
                    yield row, column, name

    def at(self, row: int, column: int) -> str:
        """What a slot holds; ``blank`` outside the page."""
        size = len(self.slots)
        return self.slots[row][column] if 0 <= row < size and 0 <= column < size else BLANK
