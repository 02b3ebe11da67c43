"""The pages of a proof: scenes of `vision_remember.synth`, with their questions as token streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .levels import Level
from .words import Streams, Words, stream

if TYPE_CHECKING:
    from vision_remember.synth import Board

BLANK_LABEL = 0
"""Number of the label of empty paper."""

SYMBOLS_FROM = 1_000_000
VALIDATION_FROM = 2_000_000
"""Indices of the train split from which the decoder's symbols and the validation pages are drawn: no page is two."""


@dataclass(frozen=True)
class Pages:
    """N pages.

    Attributes:
        pixels: (N, H, W, 3), uint8; none for pages that are read as symbols only.
        labels: (N, grid, grid), int16, what each cell holds, as numbers of `label_names`.
        tasks: (N,), the number of each page's task.
        streams: The questions.
    """

    pixels: Tensor
    labels: Tensor
    tasks: Tensor
    streams: Streams

    def __len__(self) -> int:
        return len(self.labels)

    def pixel_values(self, index: Tensor, device: str = "cpu") -> Tensor:
        """Pixels as the vision tower wants them: (B, 3, H, W), float in -1..1, on a device."""
        return self.pixels[index].to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def label_weights(self, labels: int) -> Tensor:
        """(labels,), weights of a cross-entropy: the inverse root of how often a label occurs, 1 on average."""
        counts = torch.bincount(self.labels.flatten().long(), minlength=labels).float()
        share = counts / counts.sum()
        weight = share.clamp_min(1e-4).rsqrt()
        return weight / (weight * share).sum()

    def state(self) -> dict[str, Tensor]:
        """Plain tensors to keep on disk."""
        kept = {"pixels": self.pixels, "labels": self.labels, "tasks": self.tasks}
        return kept | {f"stream_{part.name}": getattr(self.streams, part.name) for part in fields(Streams)}

    @classmethod
    def joined(cls, parts: Sequence[Pages]) -> Pages:
        """The pages of all parts, one part after the other."""
        states = [part.state() for part in parts]
        return cls.from_state({name: torch.cat([state[name] for state in states]) for name in states[0]})

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Pages:
        """The inverse of :meth:`state`."""
        streams = Streams(**{part.name: state[f"stream_{part.name}"] for part in fields(Streams)})
        return cls(state["pixels"], state["labels"], state["tasks"], streams)


def task_names(level: Level) -> tuple[str, ...]:
    """The level's tasks, in the order of the table of `vision_remember.synth`."""
    from vision_remember.synth import TASKS

    return tuple(name for name in TASKS if not level.tasks or name in level.tasks)


def task_groups(names: Sequence[str]) -> dict[str, str]:
    """The paper's group of each task."""
    from vision_remember.synth import TASKS

    return {name: TASKS[name].group for name in names}


def read_boards(names: Sequence[str]) -> tuple[Board, ...]:
    """The boards among some tasks."""
    from vision_remember.synth import TASKS

    return tuple(board for name in names if (board := TASKS[name].board) is not None)


def build_words(level: Level) -> Words:
    """The vocabulary of all tasks."""
    from vision_remember.synth import vocabulary

    return Words(vocabulary(), level.shape.grid)


def label_names() -> tuple[str, ...]:
    """What a cell can hold, two half-wide characters side by side aside."""
    from vision_remember.synth.labels import PARTS

    return PARTS


def build_pages(
    level: Level,
    words: Words,
    per_task: int,
    *,
    split: str = "train",
    first: int = 0,
    pixels: bool = True,
) -> Pages:
    """Draws pages of every task, one task after the other in turn.

    Args:
        level: The proof's level.
        words: The vocabulary.
        per_task: Pages of each task.
        split: "train" or "test" of `vision_remember.synth`, which are disjoint.
        first: Index of the first scene of each task.
        pixels: Whether pictures are kept.
    """
    from vision_remember.synth import make_scene
    from vision_remember.synth.scene import draw_page

    if level.detail == "fine":
        raise ValueError("detail='fine' puts two characters in a cell: expected 'coarse' or 'medium'")
    names, shape = task_names(level), level.shape
    images, labels, tasks = [], [], []
    rows: list[list[list[int]]] = []
    for index in range(first, first + per_task):
        for number, name in enumerate(names):
            size = {"split": split, "level": level.detail, "grid": shape.grid, "cell": shape.cell}
            if pixels:
                scene = make_scene(name, index, **size)
                images.append(scene.image)
                cells, asked = scene.labels, scene.questions
            else:
                page, asked = draw_page(name, index, **size)
                cells = page.labels
            questions = [(question.text, question.answer_tokens) for question in asked]
            row, taken = stream(words, questions, level.text_tokens)
            if taken == 0:
                raise ValueError(f"a question of task {name!r} needs more than {level.text_tokens} positions")
            rows.append(row)
            labels.append(cells)
            tasks.append(number)
    side = shape.grid * shape.cell
    columns = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Pages(
        pixels=torch.from_numpy(np.stack(images)) if pixels else torch.zeros(0, side, side, 3, dtype=torch.uint8),
        labels=torch.from_numpy(np.stack(labels).astype(np.int16)),
        tasks=torch.tensor(tasks),
        streams=Streams(*columns),
    )
