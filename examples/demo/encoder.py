"""Stage 1: the vision encoder learns to name what each patch shows, then stays frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from .pages import BAR_UNIT, BOARD, COLOURS, GRID, INKS, LETTERS, PATCH, SHAPES, TEXT_ROWS, TINTS, Pages
from .schedule import Bars, Recipe, optimise

IGNORE = -100
EMPTY = len(SHAPES)
UNITS_PER_PATCH = PATCH // BAR_UNIT


@dataclass(frozen=True)
class EncoderRecipe(Recipe):
    """How the encoder is pretrained."""

    steps: int = 110
    batch: int = 32


def patch_labels(pages: Pages) -> dict[str, Tensor]:
    """What each patch shows, (N, 144) per name; IGNORE where a name has no meaning."""
    count, half = len(pages), GRID // 2
    blank = torch.full((count, GRID, GRID), IGNORE)

    letters = blank.clone()
    letters[:, :TEXT_ROWS] = pages.letters

    # A bar of height k fills the lowest k units; a patch shows 0, 1 or 2 of them.
    floor = torch.arange(half).flip(0) * UNITS_PER_PATCH
    fills = blank.clone()
    fills[:, half:, :half] = (pages.heights[:, None, :] + 1 - floor[None, :, None]).clamp(0, UNITS_PER_PATCH)

    board_shapes = torch.full((count, BOARD**2), EMPTY)
    board_shapes.scatter_(1, pages.shape_places, torch.arange(len(SHAPES)).expand(count, -1))
    board_colours = torch.full((count, BOARD**2), IGNORE).scatter_(1, pages.shape_places, pages.shape_colours)
    shapes, colours = blank.clone(), blank.clone()
    for labels, board in ((shapes, board_shapes), (colours, board_colours)):
        labels[:, half:, half:] = (
            board.view(count, BOARD, BOARD).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        )

    named = {"letter": letters, "fill": fills, "shape": shapes, "colour": colours}
    return {name: labels.flatten(1) for name, labels in named.items()}


class EncoderHeads(nn.Module):
    """Linear read-outs: so that what they find lies linearly in the features, where a projector can reach it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"letter": len(LETTERS), "fill": UNITS_PER_PATCH + 1, "shape": EMPTY + 1, "colour": len(COLOURS)}
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.patch = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.page = nn.ModuleDict({"tint": nn.Linear(width, len(TINTS)), "ink": nn.Linear(width, len(INKS))})

    def forward(self, hidden: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logits per patch (B, 144, classes) and per page (B, classes) from hidden states (B, 145, C)."""
        hidden = self.norm(hidden)
        patches = {name: head(hidden[:, 1:]) for name, head in self.patch.items()}
        page = {name: head(hidden[:, 0]) for name, head in self.page.items()}
        return patches, page


def pretrain_encoder(
    tower: CLIPVisionModel, pages: Pages, recipe: EncoderRecipe, seed: int, bars: Bars
) -> dict[str, float]:
    """Trains the vision tower in place on the pages' own labels.

    Returns:
        Accuracy per label on the last batch.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    heads = EncoderHeads(tower.config.hidden_size)
    accuracy: dict[str, float] = {}

    def loss_of_step() -> Tensor:
        batch = pages[torch.randint(len(pages), (recipe.batch,), generator=generator)]
        hidden = tower(batch.pixel_values()).last_hidden_state
        logits, page_logits = heads(hidden)
        labels = patch_labels(batch)
        loss = F.cross_entropy(page_logits["tint"], batch.tints) + F.cross_entropy(page_logits["ink"], batch.inks)
        for name, logit in logits.items():
            loss = loss + F.cross_entropy(logit.flatten(0, 1), labels[name].flatten(), ignore_index=IGNORE)
            known = labels[name] != IGNORE
            accuracy[name] = (logit.argmax(-1) == labels[name])[known].float().mean().item()
        return loss

    tower.train()
    optimise([*tower.parameters(), *heads.parameters()], recipe, bars, loss_of_step)
    tower.eval()
    return accuracy
