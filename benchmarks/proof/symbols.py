"""Stage 2: the decoder learns to answer from symbols, before it sees a single picture.

A page is written as one vector per vision token that names the labels of the cells under it: of one cell, or of 4, 9 or
16 at once, so that no compression ratio meets a decoder that has never read tokens as full as its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from examples.demo.schedule import Bars, Recipe, optimise

from .model import EMBEDDING_STD, TokenPlaces, answer_logits
from .pages import Pages
from .words import Streams, Words

FIRST_TOKENS, LOOKUPS, ENOUGH = 6, 24, 0.85
FIRST_SHARE, DOUBLE_AFTER = 0.1, 80

SIDES = {1: 0.25, 2: 0.35, 3: 0.2, 4: 0.2}
"""Cells per side of a token, and how often a step is written so."""


class PageCode(nn.Module):
    """Writes pages of labels as decoder inputs; thrown away after the stage.

    Args:
        embed: The decoder's embedding of words.
        places: The tokens' places.
        labels: Names of the labels.
        words: The vocabulary.
        grid: Cells per side of a page.
    """

    def __init__(
        self, embed: nn.Embedding, places: TokenPlaces, labels: Sequence[str], words: Words, grid: int
    ) -> None:
        super().__init__()
        self.places, self.grid = places, grid
        width = embed.embedding_dim
        self.label = nn.Parameter(0.5 * EMBEDDING_STD * torch.randn(len(labels), width))
        with torch.no_grad():  # a label starts from the words that name it
            for index, name in enumerate(labels):
                known = [words.number(word) for word in name.replace("_", " ").lower().split() if word in words]
                if known:
                    self.label[index] += embed.weight[known].sum(0)
        for cells in SIDES:
            turns = torch.eye(width)[None] if cells == 1 else torch.linalg.qr(torch.randn(cells**2, width, width)).Q
            self.register_buffer(f"turns_{cells}", turns)

    def forward(self, labels: Tensor, cells: int) -> Tensor:
        """(B, grid, grid) labels, each token naming cells x cells of them -> (B, tokens, width)."""
        side = self.grid // cells
        blocks = labels.view(-1, side, cells, side, cells).transpose(2, 3).reshape(len(labels), side**2, cells**2)
        content = torch.einsum("bnjd,jde->bne", self.label[blocks.long()], self.get_buffer(f"turns_{cells}"))
        return self.places(content)


class Lookup:
    """Pages of random characters, and what stands in a cell: the first thing that the decoder learns.

    Begins with a few tokens of a page and doubles their number whenever the decoder reads them; then tokens that hold
    more cells are met in the same way. With whole pages at once nothing is learned in a thousand steps.

    Args:
        labels: Names of the labels.
        words: The vocabulary.
        grid: Cells per side of a page.
    """

    def __init__(self, labels: Sequence[str], words: Words, grid: int) -> None:
        named = [(index, name.split()[-1]) for index, name in enumerate(labels) if len(name.split()[-1]) == 1]
        self.labels = torch.tensor([index for index, _ in named])
        self.words = torch.tensor([words.number(name) for _, name in named])
        self.first_cell, self.grid = words.first_cell, grid
        self.read: list[int] = []
        self.shown, self._recent = FIRST_TOKENS, [0.0]

    @property
    def next(self) -> int | None:
        """Cells per side of the tokens that are being learned; None when all are."""
        return next((cells for cells in SIDES if cells not in self.read), None)

    def learned(self, accuracy: float) -> None:
        """Notes the accuracy of a step on what is being learned."""
        self._recent = [*self._recent[-2:], accuracy]
        cells = self.next
        if cells is None or len(self._recent) < 3 or min(self._recent) < ENOUGH:
            return
        tokens = (self.grid // cells) ** 2
        if self.shown >= tokens:
            self.read.append(cells)
            self.shown = FIRST_TOKENS
        else:
            self.shown = min(tokens, 2 * self.shown)
        self._recent = [0.0]

    def draw(self, batch: int, cells: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Streams]:
        """Labels (batch, grid, grid), the tokens that are shown (batch, shown), in order, and questions about them."""
        side, count = self.grid // cells, self.grid**2
        shown = self.shown if cells == self.next else side**2
        chosen = torch.randint(len(self.labels), (batch, count), generator=generator)
        order = torch.rand(batch, side**2, generator=generator).argsort(1)[:, :shown].sort(1).values
        token = order.gather(1, torch.randint(order.shape[1], (batch, LOOKUPS), generator=generator))
        inside = torch.randint(cells**2, (batch, LOOKUPS), generator=generator)
        row, column = token // side * cells + inside // cells, token % side * cells + inside % cells
        asked = row * self.grid + column
        branch = torch.arange(LOOKUPS).expand(batch, -1)
        streams = Streams(
            self.first_cell + asked, branch, torch.zeros_like(branch), self.words[chosen.gather(1, asked)]
        )
        return self.labels[chosen].view(batch, self.grid, self.grid), order, streams


def task_tokens(step: int, cells: int, grid: int) -> int:
    """How many tokens of a task's page are shown at a step: few at first, in the end all."""
    tokens = (grid // cells) ** 2
    return min(tokens, math.ceil(tokens * FIRST_SHARE * 2 ** (step // DOUBLE_AFTER)))


def written_first(labels: Tensor, cells: int, count: int, generator: torch.Generator) -> Tensor:
    """(B, count) tokens of pages (B, grid, grid), in order: first those that hold something, then any others."""
    side = labels.shape[1] // cells
    written = (labels > 1).view(-1, side, cells, side, cells).any(4).any(2).flatten(1)
    draw = torch.rand(written.shape, generator=generator) - written.float()
    return draw.argsort(1)[:, :count].sort(1).values


def pretrain_decoder(
    model: LlavaForConditionalGeneration,
    places: TokenPlaces,
    pages: Pages,
    labels: Sequence[str],
    words: Words,
    recipe: Recipe,
    seed: int,
    bars: Bars,
    device: str,
) -> dict[str, list[tuple[int, float, float]]]:
    """Trains the decoder and the places in place: first to look single cells up, then that and the tasks by turns.

    Returns:
        By cells per token, of the tasks: step, loss and accuracy per answer word, mean over the steps since the last
        such point.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    decoder = model.model.language_model
    grid = pages.labels.shape[1]
    with torch.no_grad():  # a cell's name starts from its place
        start = words.first_cell
        decoder.embed_tokens.weight[start : start + grid**2] = places.table()
    code = PageCode(decoder.embed_tokens, places, labels, words, grid)
    trained = nn.ModuleList([decoder, model.lm_head, code]).to(device)
    lookup = Lookup(labels, words, grid)
    recent: dict[str, list[tuple[float, float]]] = {}
    curve: dict[str, list[tuple[int, float, float]]] = {}
    turn = itertools.count()
    steps_on_tasks = dict.fromkeys(SIDES, 0)

    def loss_of_step() -> Tensor:
        learning, number = lookup.next, next(turn)
        # What is being learned takes every other step, the tasks what is left.
        looks_up = not lookup.read or number % (4 if learning is None else 2) == 0
        if looks_up and learning is not None:
            cells = learning
        else:
            share = torch.tensor([SIDES[cells] for cells in lookup.read])
            cells = lookup.read[int(torch.multinomial(share, 1, generator=generator))]
        if looks_up:
            drawn, shown, streams = lookup.draw(recipe.batch, cells, generator)
            vision = code(drawn.to(device), cells)
            vision = vision.gather(1, shown.to(device)[..., None].expand(-1, -1, vision.shape[2]))
        else:
            # Pages of single cells are four times as long as the next.
            count = recipe.batch // 2 if cells == 1 else recipe.batch
            batch = torch.randint(len(pages), (count,), generator=generator)
            vision, streams = code(pages.labels[batch].to(device), cells), pages.streams[batch]
            shown = written_first(
                pages.labels[batch], cells, task_tokens(steps_on_tasks[cells], cells, grid), generator
            )
            vision = vision.gather(1, shown.to(device)[..., None].expand(-1, -1, vision.shape[2]))
            steps_on_tasks[cells] += 1
        logits, truth = answer_logits(model, vision, streams.to(device))
        loss = F.cross_entropy(logits, truth)
        accuracy = (logits.argmax(-1) == truth).float().mean().item()
        if looks_up and cells == learning:
            lookup.learned(accuracy)
        name = f"{'look-up' if looks_up else 'tasks'} {cells}x{cells}"
        recent.setdefault(name, []).append((loss.item(), accuracy))
        return loss

    def note(step: int) -> None:
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            for name, values in recent.items():
                if values:
                    loss, right = torch.tensor(values).mean(0).tolist()
                    curve.setdefault(name, []).append((step + 1, round(loss, 4), round(right, 4)))
                    values.clear()

    model.train()
    optimise(trained.parameters(), recipe, bars, loss_of_step, after=note)
    model.eval()
    return curve
