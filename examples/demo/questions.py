"""The questions a page can be asked, their packing into one sequence, and what luck alone would answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .pages import BAR_HEIGHTS, BARS, COLOURS, INKS, LETTERS, PLACES, SHAPES, TEXT_COLUMNS, TEXT_ROWS, TINTS, Pages

SPECIALS = ("<pad>", "<eos>", "<unk>", "<image>")
PAD, EOS, UNK, IMAGE = range(len(SPECIALS))

LETTER_QUESTIONS = tuple(f"letter@{row + 1},{column + 1}" for row in range(TEXT_ROWS) for column in range(TEXT_COLUMNS))
BAR_QUESTIONS = tuple(f"bar@{bar + 1}" for bar in range(BARS))
COLOUR_QUESTIONS = tuple(f"colour-of-{shape}" for shape in SHAPES)
PLACE_QUESTIONS = tuple(f"place-of-{shape}" for shape in SHAPES)
PAGE_QUESTIONS = ("page-tint", "page-ink")
QUESTIONS = LETTER_QUESTIONS + BAR_QUESTIONS + COLOUR_QUESTIONS + PLACE_QUESTIONS + PAGE_QUESTIONS

HEIGHTS = tuple(str(height + 1) for height in range(BAR_HEIGHTS))
ANSWERS = LETTERS + HEIGHTS + tuple(COLOURS) + PLACES + tuple(TINTS) + tuple(INKS)
VOCABULARY = SPECIALS + ANSWERS + QUESTIONS
TOKEN_IDS = {word: index for index, word in enumerate(VOCABULARY)}


def token_ids(words: Sequence[str]) -> Tensor:
    """The words' ids in the vocabulary, (len(words),)."""
    return torch.tensor([TOKEN_IDS[word] for word in words])


@dataclass(frozen=True)
class Kind:
    """One row of the accuracy table.

    Attributes:
        name: What the table calls it.
        columns: The questions of this kind, as positions in QUESTIONS.
        chance: Accuracy of a uniform guess among the fitting answers.
    """

    name: str
    columns: range
    chance: float


def _kinds() -> tuple[Kind, ...]:
    page_chance = (1 / len(TINTS) + 1 / len(INKS)) / 2
    sizes = (
        ("characters", LETTER_QUESTIONS, 1 / len(LETTERS)),
        ("bar heights", BAR_QUESTIONS, 1 / BAR_HEIGHTS),
        ("shape colours", COLOUR_QUESTIONS, 1 / len(COLOURS)),
        ("shape places", PLACE_QUESTIONS, 1 / len(PLACES)),
        ("page", PAGE_QUESTIONS, page_chance),
    )
    kinds, start = [], 0
    for name, questions, chance in sizes:
        kinds.append(Kind(name, range(start, start + len(questions)), chance))
        start += len(questions)
    return tuple(kinds)


KINDS = _kinds()


def answers(pages: Pages) -> Tensor:
    """The right answer's token id to every question about every page, (N, len(QUESTIONS))."""
    return torch.cat(
        [
            token_ids(LETTERS)[pages.letters].flatten(1),
            token_ids(HEIGHTS)[pages.heights],
            token_ids(tuple(COLOURS))[pages.shape_colours],
            token_ids(PLACES)[pages.shape_places],
            token_ids(tuple(TINTS))[pages.tints, None],
            token_ids(tuple(INKS))[pages.inks, None],
        ],
        dim=1,
    )


def sample_columns(pages: int, letters: int, generator: torch.Generator) -> Tensor:
    """Questions to ask in one training step: `letters` random letters and everything else, (pages, questions)."""
    columns = torch.rand(pages, len(LETTER_QUESTIONS), generator=generator).topk(letters).indices
    others = torch.arange(len(LETTER_QUESTIONS), len(QUESTIONS)).expand(pages, -1)
    return torch.cat([columns, others], dim=1)


@dataclass(frozen=True)
class Packed:
    """Many questions about one page in one sequence, each blind to the others.

    Attributes:
        input_ids: (B, tokens + questions), the vision placeholders first.
        attention_mask: The mask (1, 1, L, L) of each kind of decoder layer, added to the attention logits: every
            question sees what it would see if it were alone behind the page.
        position_ids: (1, L): every question stands at the position it would have if it were alone.
    """

    input_ids: Tensor
    attention_mask: dict[str, Tensor]
    position_ids: Tensor


def pack(columns: Tensor, vision_tokens: int, window: int) -> Packed:
    """Packs each page's questions behind its vision tokens; equal to asking them one by one.

    Args:
        columns: (B, questions), positions in QUESTIONS.
        vision_tokens: Vision tokens per page.
        window: Positions that the decoder's sliding layer sees, its own included.
    """
    batch, count = columns.shape
    image = torch.full((batch, vision_tokens), IMAGE)
    positions = torch.cat([torch.arange(vision_tokens), torch.full((count,), vision_tokens)])
    distance = positions[:, None] - positions[None, :]
    own = torch.eye(vision_tokens + count, dtype=torch.bool)
    visible = {"full_attention": (distance > 0) | own, "sliding_attention": (distance > 0) & (distance < window) | own}
    lowest = torch.finfo(torch.float32).min
    masks = {kind: torch.zeros(seen.shape).masked_fill(~seen, lowest)[None, None] for kind, seen in visible.items()}
    return Packed(torch.cat([image, token_ids(QUESTIONS)[columns]], dim=1), masks, positions[None])


def bag_ceiling(letters_per_token: int = 4, trials: int = 400_000, seed: int = 0) -> float:
    """Best possible accuracy on characters when a token keeps which letters it holds, but not where.

    Given the bag, the best answer to any place is its commonest letter, right as often as that letter fills the places.
    """
    generator = torch.Generator().manual_seed(seed)
    bags = torch.randint(len(LETTERS), (trials, letters_per_token), generator=generator)
    counts = torch.zeros(trials, len(LETTERS)).scatter_add_(1, bags, torch.ones(bags.shape))
    return (counts.amax(1) / letters_per_token).mean().item()
