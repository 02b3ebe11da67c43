"""Stage 1: the vision encoder learns what each cell shows, is frozen, and its features are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from examples.demo.schedule import Bars, Recipe, optimise
from vision_remember import MultiLevelTap
from vision_remember.adapters.attach import default_levels
from vision_remember.encoder import scale_levels
from vision_remember.projectors import PROJECTORS

from .model import products
from .pages import Pages

CENTERS = ("mean", "none")


class EncoderHeads(nn.Module):
    """Linear read-outs: what they find lies linearly in the features, where a projector can reach it.

    The CLS token says which kinds of cell the page holds at all: as with a caption, it has to look at what is there.
    """

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.cell, self.page = nn.Linear(width, labels), nn.Linear(width, labels)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + H*W, C) -> logits per cell (B, H*W, labels) and for the page (B, labels)."""
        hidden = self.norm(hidden)
        return self.cell(hidden[:, 1:]), self.page(hidden[:, 0])


def pretrain_encoder(
    model: LlavaForConditionalGeneration,
    pages: Pages,
    labels: int,
    recipe: Recipe,
    seed: int,
    bars: Bars,
    device: str,
    half: bool,
) -> dict[str, float]:
    """Trains the vision tower in place.

    Returns:
        Accuracy per cell on the last batches, on all cells and on those that are not the page's commonest.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tower = model.model.vision_tower.to(device)
    heads = EncoderHeads(tower.config.hidden_size, labels).to(device)
    # blank cells are most of a page: the rare ones count as much together
    weight = pages.label_weights(labels).to(device)
    found: list[tuple[float, float]] = []

    def loss_of_step() -> Tensor:
        batch = torch.randint(len(pages), (recipe.batch,), generator=generator)
        truth = pages.labels[batch].flatten(1).long().to(device)
        with products(device, half):
            cells, page = heads(tower(pages.pixel_values(batch, device)).last_hidden_state)
        cells, page = cells.float(), page.float()
        present = torch.zeros_like(page).scatter_(1, truth, 1.0)
        right = cells.argmax(-1) == truth
        written = truth != truth.mode(1, keepdim=True).values
        found.append((right.float().mean().item(), right[written].float().mean().item()))
        named = F.cross_entropy(cells.flatten(0, 1), truth.flatten(), weight=weight)
        return named + F.binary_cross_entropy_with_logits(page, present)

    tower.train()
    optimise([*tower.parameters(), *heads.parameters()], recipe, bars, loss_of_step)
    tower.eval()
    last = np.mean(found[-10:], axis=0)
    return {"cells": float(last[0]), "written_cells": float(last[1])}


def kept_levels(depth: int) -> tuple[int, ...]:
    """The levels of the encoder that some arm reads."""
    read = {*default_levels(depth), depth, *scale_levels(PROJECTORS["token_packer"].encoder_levels, depth)}
    return tuple(sorted(read))


@dataclass(frozen=True)
class Features:
    """What the frozen encoder says about N pages.

    Attributes:
        levels: By `hidden_states` index, (N, H*W, C), bfloat16.
        saliency: By centre, (N, H*W).
    """

    levels: dict[int, Tensor]
    saliency: dict[str, Tensor]
    _moved: dict[tuple[int, str], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def level(self, number: int, index: Tensor, device: str) -> Tensor:
        """(B, H*W, C), float32, some pages' features of a level. A level that was asked for stays on the device."""
        if torch.device(device).type == "cpu":
            return self.levels[number][index].float()
        if (number, device) not in self._moved:
            self._moved[number, device] = self.levels[number].to(device)
        return self._moved[number, device][index.to(device)].float()

    def save(self, path: Path) -> None:
        """Writes them to a file that processes can share."""
        unfinished = path.with_suffix(".tmp")
        torch.save({"levels": self.levels, "saliency": self.saliency}, unfinished)
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> Features:
        """Reads them, mapped into memory."""
        return cls(**torch.load(path, weights_only=True, mmap=True))


@torch.no_grad()
def encode(model: LlavaForConditionalGeneration, pages: Pages, device: str, batch: int = 128) -> Features:
    """Runs the encoder once over all pages."""
    tower = model.model.vision_tower.to(device)
    numbers = kept_levels(tower.config.num_hidden_layers)
    deepest = max(default_levels(tower.config.num_hidden_layers))
    taps = {center: MultiLevelTap(tower, numbers, saliency_level=deepest, center=center) for center in CENTERS}
    levels: dict[int, list[Tensor]] = {number: [] for number in numbers}
    saliency: dict[str, list[Tensor]] = {center: [] for center in CENTERS}
    for start in range(0, len(pages), batch):
        pixels = pages.pixel_values(torch.arange(start, min(start + batch, len(pages))), device)
        with taps["mean"].capture() as captured, taps["none"].capture() as plain:
            tower(pixels)
        for number, level in zip(numbers, captured.levels, strict=True):
            levels[number].append(level.bfloat16().cpu())
        for center, run in (("mean", captured), ("none", plain)):
            assert run.saliency is not None
            saliency[center].append(run.saliency.float().cpu())
    return Features(
        {number: torch.cat(parts) for number, parts in levels.items()},
        {center: torch.cat(parts) for center, parts in saliency.items()},
    )
