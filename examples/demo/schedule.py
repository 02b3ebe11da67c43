"""The optimisation loop that all stages share, and its progress bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

_WHOLE_FORMAT = "{desc:<32} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"
_STAGE_FORMAT = "{desc:<32} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"

SHOWN_EVERY = 10
"""Steps on a GPU between two losses that a bar shows."""

Bars: TypeAlias = "Iterable[tqdm[Any]]"
"""A stage's progress bar, once per step."""


@dataclass(frozen=True)
class Recipe:
    """AdamW with warm-up, cosine decay and clipping."""

    steps: int
    batch: int
    lr: float = 2e-3
    warmup: int = 40
    weight_decay: float = 0.01
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate at a step, relative to `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


class Progress:
    """One bar for the whole demo and one for the stage that runs.

    Args:
        costs: Seconds, roughly, that each stage takes: only their proportions matter.
    """

    def __init__(self, costs: Mapping[str, float]) -> None:
        self._costs = dict(costs)
        self._whole = tqdm(total=sum(costs.values()), desc="whole demo", bar_format=_WHOLE_FORMAT, dynamic_ncols=True)

    def steps(self, stage: str, count: int) -> Iterator[tqdm[Any]]:
        """Runs a stage of `count` steps; yields its bar once per step."""
        with tqdm(total=count, desc=stage, bar_format=_STAGE_FORMAT, dynamic_ncols=True, leave=False) as bar:
            for _ in range(count):
                yield bar
                bar.update()
                self._whole.update(self._costs[stage] / count)

    def skip(self, stage: str) -> None:
        """Takes a stage whose result was cached out of the time that is left."""
        self._whole.total = (self._whole.total or 0) - self._costs[stage]
        self._whole.refresh()

    def close(self) -> None:
        """Leaves the bars as they stand."""
        self._whole.close()


def optimise(
    parameters: Iterable[nn.Parameter],
    recipe: Recipe,
    bars: Bars,
    loss_of_step: Callable[[], Tensor],
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Runs a recipe.

    Args:
        parameters: What trains; parameters that do not require a gradient are left out.
        recipe: Length and optimiser settings.
        bars: The stage's progress bar, once per step.
        loss_of_step: The loss of the next batch.
        after: Called with the number of each step when it is done.

    Returns:
        The loss of every step.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    on_gpu = trained[0].is_cuda
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=on_gpu or None
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    losses: list[Tensor] = []
    for step, bar in enumerate(bars):
        loss = loss_of_step()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if not on_gpu or step % SHOWN_EVERY == 0:  # to read a number is to wait for the GPU
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        after(step)
    return [loss.item() for loss in losses]
