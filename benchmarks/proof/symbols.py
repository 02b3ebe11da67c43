"""Stage 2: the decoder learns to answer from symbols, before it sees a single picture.

A page is written as one vector per vision token that names the labels of the cells under it. One decoder is made for
each compression ratio: it reads tokens that name one cell, as uncompressed tokens do, and tokens that name as many
cells as that ratio pools, each cell in a subspace of its own. No arm meets a decoder that has never read tokens as full
as its own, and all arms of a ratio meet the same. A ratio's decoder goes on from that of the ratio before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from examples.demo.schedule import Bars, optimise

from .levels import DecoderRecipe
from .model import EMBEDDING_STD, TokenPlaces, answer_logits, products
from .pages import BLANK_LABEL, Pages, read_boards
from .words import IGNORE, Streams, Words

FIRST_TOKENS, MOST_TOKENS, FIRST_CELLS, LOOKUPS, ENOUGH = 6, 36, 2, 24, 0.85
LOUDNESS = 0.7
TASKS_EVERY = 5


class PageCode(nn.Module):
    """Writes pages of labels as decoder inputs; thrown away after the stage.

    Args:
        embed: The decoder's embedding of words.
        places: The tokens' places.
        labels: Names of the labels.
        words: The vocabulary.
        grid: Cells per side of a page.
        side: Cells per side of the tokens that are read besides those of one cell.
    """

    def __init__(
        self, embed: nn.Embedding, places: TokenPlaces, labels: Sequence[str], words: Words, grid: int, side: int
    ) -> None:
        super().__init__()
        self.places, self.grid, self.side = places, grid, side
        width, count = embed.embedding_dim, side**2
        self.label = nn.Parameter(0.5 * EMBEDDING_STD * torch.randn(len(labels), width))
        with torch.no_grad():  # a label starts from the words that name it
            for index, name in enumerate(labels):
                known = [words.number(word) for word in name.replace("_", " ").lower().split() if word in words]
                if known:
                    self.label[index] += embed.weight[known].sum(0) / math.sqrt(len(known))
        # Each cell of a token writes a few directions of its own, so that a narrow decoder can tell the cells apart.
        part = width // count
        to = torch.linalg.qr(torch.randn(width, width)).Q[: count * part].view(count, part, width)
        by = torch.linalg.qr(torch.randn(count, width, part)).Q
        self.register_buffer("turns", LOUDNESS * math.sqrt(width / part) * by @ to)

    def forward(self, labels: Tensor, cells: int) -> Tensor:
        """(B, grid, grid) labels, each token naming cells x cells of them, 1 or `side` -> (B, tokens, width)."""
        side = self.grid // cells
        blocks = labels.view(-1, side, cells, side, cells).transpose(2, 3).reshape(len(labels), side**2, cells**2)
        content = (
            F.embedding(blocks.long(), self.label) * (blocks != BLANK_LABEL)[..., None]
        )  # empty paper says nothing
        if cells == 1:
            return self.places(content[:, :, 0])
        return self.places(torch.einsum("bnjd,jde->bne", content, self.get_buffer("turns")))


class Lookup:
    """Boards with contents of all kinds mixed, and questions about what stands in a cell.

    Args:
        labels: Names of the labels.
        words: The vocabulary.
        grid: Cells per side of a page.
        tasks: Names of the level's tasks, of which the boards count.
    """

    def __init__(self, labels: Sequence[str], words: Words, grid: int, tasks: Sequence[str]) -> None:
        asked = [
            (labels.index(content), words.number(word), words.number(aspect.of(content)))
            for board in read_boards(tasks)
            for content in board.contents
            for word, aspect in board.aspects.items()
        ]
        self.label, self.asks, self.answer = torch.tensor(sorted(set(asked))).T
        self.first_cell, self.grid = words.first_cell, grid

    def draw(
        self, batch: int, cells: int, shown: int, filled: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Streams]:
        """Random boards and questions about them.

        Args:
            batch: B.
            cells: Cells per side of a token.
            shown: Tokens that are shown.
            filled: Share of cells that hold something; only such cells are asked for.
            generator: Draws.

        Returns:
            Labels (B, grid, grid), the tokens that are shown (B, shown), in order, and the questions.
        """
        side, count = self.grid // cells, self.grid**2
        drawn = torch.randint(len(self.label), (batch, count), generator=generator)
        order = torch.rand(batch, side**2, generator=generator).argsort(1)[:, :shown].sort(1).values
        row, column = torch.arange(count) // self.grid, torch.arange(count) % self.grid
        seen = torch.zeros(batch, side**2).scatter_(1, order, 1.0)[:, row // cells * side + column // cells]
        holds = torch.rand(batch, count, generator=generator) < filled
        # a page on which no cell is filled and shown is filled whole
        holds |= ~(holds & (seen > 0)).any(1, keepdim=True)
        cell = torch.multinomial(seen * holds, LOOKUPS, replacement=True, generator=generator)
        kind = drawn.gather(1, cell)
        tokens = torch.stack([self.asks[kind], self.first_cell + cell], dim=-1).flatten(1)
        target = torch.stack([torch.full_like(kind, IGNORE), self.answer[kind]], dim=-1).flatten(1)
        branch = torch.arange(LOOKUPS).repeat_interleave(2).expand(batch, -1)
        place = torch.arange(2).repeat(LOOKUPS).expand(batch, -1)
        pages = self.label[drawn].where(holds, torch.full_like(drawn, BLANK_LABEL)).view(batch, self.grid, self.grid)
        return pages, order, Streams(tokens, branch, place, target)


class Curriculum:
    """What is shown grows as it is read: the tokens of a page, then the cells that its tokens hold.

    With whole pages at once nothing is learned in a thousand steps.

    Args:
        side: Cells per side of the tokens that are learned after those of one cell.
        reads_cells: Whether those of one cell are read already.
    """

    def __init__(self, side: int, reads_cells: bool = False) -> None:
        self.reads_cells = reads_cells
        self.shown = MOST_TOKENS if reads_cells else FIRST_TOKENS
        self.filled = FIRST_CELLS / side**2
        self._recent: list[float] = []

    def note(self, accuracy: float) -> None:
        """Notes the accuracy of a step on what is being learned."""
        self._recent = [*self._recent[-2:], accuracy]
        if len(self._recent) < 3 or min(self._recent) < ENOUGH:
            return
        self._recent = []
        if self.reads_cells:
            self.filled = min(1.0, 1.5 * self.filled)
        else:
            self.reads_cells = self.shown == MOST_TOKENS
            self.shown = min(MOST_TOKENS, 2 * self.shown)


def look_up(
    model: LlavaForConditionalGeneration,
    code: PageCode,
    lookup: Lookup,
    cells: int,
    batch: int,
    shown: int,
    filled: float,
    generator: torch.Generator,
    device: str,
) -> tuple[Tensor, Tensor]:
    """Logits and right words of a step's look-ups."""
    drawn, order, streams = lookup.draw(batch, cells, shown, filled, generator)
    vision = code(drawn.to(device), cells)
    vision = vision.gather(1, order.to(device)[..., None].expand(-1, -1, vision.shape[2]))
    return answer_logits(model, vision, streams.to(device))


def pretrain_decoder(
    model: LlavaForConditionalGeneration,
    places: TokenPlaces,
    pages: Pages,
    labels: Sequence[str],
    words: Words,
    tasks: Sequence[str],
    recipe: DecoderRecipe,
    seed: int,
    bars: Bars,
    device: str,
    half: bool,
    label_code: Tensor | None = None,
) -> dict[str, Any]:
    """Trains the decoder and the places in place, to read tokens of one cell and of `recipe.side` cells per side.

    Args:
        model: Its decoder trains.
        places: The tokens' places.
        pages: Pages of the tasks, as symbols.
        labels: Names of the labels.
        words: The vocabulary.
        tasks: Names of the tasks.
        recipe: How long, and for which tokens.
        seed: Draws the code and the pages.
        bars: The stage's progress bar, once per step.
        device: Where it runs.
        half: Whether matrix products run in bfloat16.
        label_code: The "label_code" of the stage before, whose decoder and places these are; None for the first.

    Returns:
        "reads": by cells per token, the share of look-ups on whole new pages that are right. "curve": by what was
        trained, step, loss and accuracy per answer word, means over the steps since the last such point. "label_code":
        how labels are written.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    decoder = model.model.language_model
    grid, side = pages.labels.shape[1], recipe.side
    code = PageCode(decoder.embed_tokens, places, labels, words, grid, side)
    curriculum = Curriculum(side, label_code is not None)
    with torch.no_grad():
        names = decoder.embed_tokens.weight[words.first_cell : words.first_cell + grid**2]
        if label_code is None:
            names.copy_(places.table())  # a cell's name starts from its place
        else:
            code.label.copy_(label_code)
        # and says besides which of its token's cells it is
        row, column = torch.arange(grid**2) // grid, torch.arange(grid**2) % grid
        names += (EMBEDDING_STD * torch.randn(side**2, names.shape[1]))[row % side * side + column % side]
    trained = nn.ModuleList([decoder, model.lm_head, code]).to(device)
    lookup = Lookup(labels, words, grid, tasks)
    whole = (grid // side) ** 2
    recent: dict[str, list[tuple[float, float]]] = {}
    curve: dict[str, list[tuple[int, float, float]]] = {}
    turn = itertools.count()

    def loss_of_step() -> Tensor:
        number = next(turn)
        learning = f"look-up {side}x{side}" if curriculum.reads_cells else "look-up 1x1"
        cells = side if curriculum.reads_cells and number % 4 else 1
        if curriculum.reads_cells and number % TASKS_EVERY == 0:
            name = f"tasks {cells}x{cells}"
            batch = torch.randint(len(pages), (recipe.batch // 2,), generator=generator)
            with products(device, half):
                vision, streams = code(pages.labels[batch].to(device), cells), pages.streams[batch]
                logits, truth = answer_logits(model, vision, streams.to(device))
        else:
            name = f"look-up {cells}x{cells}"
            shown, filled = (curriculum.shown, 1.0) if cells == 1 else (whole, curriculum.filled)
            with products(device, half):
                logits, truth = look_up(model, code, lookup, cells, recipe.batch, shown, filled, generator, device)
        loss = F.cross_entropy(logits.float(), truth)
        accuracy = (logits.argmax(-1) == truth).float().mean().item()
        if name == learning:
            curriculum.note(accuracy)
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
    reads = {}
    with torch.no_grad(), products(device, half):
        for cells in (1, side):
            size = (grid // cells) ** 2
            logits, truth = look_up(model, code, lookup, cells, 4 * recipe.batch, size, 1.0, generator, device)
            reads[str(cells)] = round((logits.argmax(-1) == truth).float().mean().item(), 4)
    return {"reads": reads, "curve": curve, "label_code": code.label.detach().cpu()}
