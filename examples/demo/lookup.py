"""Stage 2: the decoder learns to look things up in symbolic tables, before it ever sees an image.

A table is a row of input vectors, one per cell: what the cell holds plus learned embeddings of its row and column.
Tables come in two codes, so that no arm's tokens are favoured: one letter per cell, as uncompressed tokens show a page,
and four letters per cell, each turned by its own fixed random rotation, as a token that still knows where each letter
stood could. Without this stage no arm, the uncompressed one included, learns to look up a letter within the demo's few
training steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from .models import WINDOW, TokenPlaces
from .pages import BOARD, COLOURS, GRID, LETTERS, PLACES, SHAPES, TEXT_COLUMNS, TEXT_ROWS
from .questions import (
    BAR_QUESTIONS,
    COLOUR_QUESTIONS,
    LETTER_QUESTIONS,
    PLACE_QUESTIONS,
    QUESTIONS,
    pack,
    token_ids,
)
from .schedule import Bars, Recipe, optimise

CELLS = TEXT_ROWS * TEXT_COLUMNS
FIRST_SHAPE = QUESTIONS.index(COLOUR_QUESTIONS[0])


@dataclass(frozen=True)
class LookupRecipe(Recipe):
    """How the decoder is pretrained.

    Attributes:
        questions: Letters asked per table.
        growth: Over this share of the steps tables grow from 4 cells to all 72.
        quads_from: After this share of the steps three tables of four hold four letters per cell.
    """

    steps: int = 350
    batch: int = 32
    questions: int = 24
    growth: float = 0.2
    quads_from: float = 0.2


class TableCode(nn.Module):
    """Writes tables as decoder inputs; thrown away after the stage."""

    def __init__(self, embed: nn.Embedding, places: TokenPlaces) -> None:
        super().__init__()
        width = embed.embedding_dim
        self.embed, self.places = embed, places
        self.shape = nn.Parameter(embed.weight.std().item() * torch.randn(len(SHAPES), width))
        self.register_buffer("turns", torch.linalg.qr(torch.randn(4, width, width)).Q)
        self._compose_questions()

    @torch.no_grad()
    def _compose_questions(self) -> None:
        """Starts each question from the place or shape it names, so that questions and cells speak alike."""
        weight = self.embed.weight
        letter, bar, colour, place = weight.std() * torch.randn(4, weight.shape[1])
        weight[token_ids(LETTER_QUESTIONS)] = letter + self.places.grid(GRID)[:TEXT_ROWS].flatten(0, 1)
        weight[token_ids(BAR_QUESTIONS)] = bar + self.places.column[: len(BAR_QUESTIONS)]
        weight[token_ids(COLOUR_QUESTIONS)] = colour + self.shape
        weight[token_ids(PLACE_QUESTIONS)] = place + self.shape

    def cells(self, letters: Tensor, kept: Tensor) -> Tensor:
        """One letter per cell: letters (B, 72), kept (B, n) cell numbers -> (B, n, width)."""
        content = self.embed(token_ids(LETTERS)[letters.gather(1, kept)])
        return content + self.places.grid(GRID)[:TEXT_ROWS].flatten(0, 1)[kept]

    def quads(self, letters: Tensor) -> Tensor:
        """Four letters per cell: letters (B, 72) -> (B, 18, width)."""
        rows, columns = TEXT_ROWS // 2, TEXT_COLUMNS // 2
        blocks = letters.view(-1, rows, 2, columns, 2).transpose(2, 3).reshape(-1, rows * columns, 4)
        content = torch.einsum("bnjd,jde->bne", self.embed(token_ids(LETTERS)[blocks]), self.turns)
        return content + self.places.grid(GRID // 2)[:rows].flatten(0, 1)

    def shapes(self, colours: Tensor, places: Tensor) -> Tensor:
        """Four coloured shapes on the board: colours, places (B, 4) -> (B, 4, width)."""
        board = self.places.grid(GRID // 2)[-BOARD:, -BOARD:].flatten(0, 1)
        return self.embed(token_ids(tuple(COLOURS))[colours]) + self.shape + board[places]


def pretrain_lookup(
    model: LlavaForConditionalGeneration, places: TokenPlaces, recipe: LookupRecipe, seed: int, bars: Bars
) -> dict[str, float]:
    """Trains the decoder and the places in place.

    Returns:
        Accuracy on the last table of each code.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = model.model.language_model
    torch.manual_seed(seed)
    code = TableCode(decoder.embed_tokens, places)
    accuracy: dict[str, float] = {}
    steps = count(start=0)

    def integers(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    def loss_of_step() -> Tensor:
        step = next(steps)
        progress = step / recipe.steps
        quads = progress > recipe.quads_from and step % 4 != 0
        shown = CELLS if quads else min(CELLS, 4 + int((CELLS - 4) * progress / recipe.growth))
        letters = integers(len(LETTERS), recipe.batch, CELLS)
        order = torch.rand(recipe.batch, CELLS, generator=generator).argsort(1)[:, :shown]
        colours = integers(len(COLOURS), recipe.batch, len(SHAPES))
        places = torch.rand(recipe.batch, BOARD**2, generator=generator).argsort(1)[:, : len(SHAPES)]

        table = code.quads(letters) if quads else code.cells(letters, order.sort(1).values)
        table = torch.cat([table, code.shapes(colours, places)], dim=1)
        asked = order[:, : recipe.questions]
        columns = torch.cat([asked, torch.arange(FIRST_SHAPE, FIRST_SHAPE + 8).expand(recipe.batch, -1)], dim=1)
        packed = pack(columns, table.shape[1], WINDOW)
        questions = code.embed(packed.input_ids[:, table.shape[1] :])
        hidden = decoder(
            inputs_embeds=torch.cat([table, questions], dim=1),
            attention_mask=packed.attention_mask,
            position_ids=packed.position_ids,
            use_cache=False,
        ).last_hidden_state[:, table.shape[1] :]
        logits = model.lm_head(hidden)
        truth = torch.cat(
            [
                token_ids(LETTERS)[letters.gather(1, asked)],
                token_ids(tuple(COLOURS))[colours],
                token_ids(PLACES)[places],
            ],
            dim=1,
        )
        right = logits.argmax(-1) == truth
        name = "four letters per cell" if quads else "one letter per cell"
        accuracy[name] = right[:, : asked.shape[1]].float().mean().item()
        accuracy["shapes"] = right[:, asked.shape[1] :].float().mean().item()
        return F.cross_entropy(logits.flatten(0, 1), truth.flatten())

    model.train()
    trained = nn.ModuleList([decoder, model.lm_head, code])
    optimise(trained.parameters(), recipe, bars, loss_of_step)
    model.eval()
    return accuracy
