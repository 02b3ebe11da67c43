"""Stage 3: one arm, one seed, one record."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.demo.schedule import Bars, optimise

from .arms import Arm, ArmSpec, Pretrained, build_arm
from .encoder import Features
from .levels import Level
from .model import answer_logits, products
from .pages import Pages
from .words import Streams, Words


@dataclass(frozen=True)
class Set:
    """Pages with the features that the encoder made of them."""

    pages: Pages
    features: Features


@dataclass(frozen=True)
class World:
    """All that every run shares.

    Attributes:
        level: The proof's level.
        words: The vocabulary.
        tasks: Names of the tasks, by number.
        pretrained: The encoder and the decoder, by cells per side of a pooled token.
        train: What arms train on.
        validation: What curves and choices look at.
        test: What the tables report.
    """

    level: Level
    words: Words
    tasks: Sequence[str]
    pretrained: Mapping[int, Pretrained]
    train: Set
    validation: Set
    test: Set


def arm_logits(arm: Arm, data: Set, index: Tensor, device: str, half: bool) -> tuple[Tensor, Tensor, Streams]:
    """Logits and right words where some pages' questions are answered, and the questions."""
    streams = data.pages.streams[index].to(device)
    with products(device, half):
        vision = arm.vision_tokens(data.features, index, device)
        length = arm.tokens + streams.tokens.shape[1]
        options = arm.options(data.features, index, length, device)
        logits, truth = answer_logits(arm.model, vision, streams, **options)
    return logits.float(), truth, streams


@torch.no_grad()
def evaluate(arm: Arm, data: Set, level: Level, tasks: Sequence[str]) -> dict[str, float]:
    """Share of questions answered right, by task: every word of the answer, each after the right ones before it.

    That is exact match of what greedy decoding writes, because it goes wrong where its first wrong word stands.
    """
    arm.model.eval()
    right, asked = torch.zeros(len(tasks)), torch.zeros(len(tasks))
    for index in torch.arange(len(data.pages)).split(level.arm.batch):
        logits, truth, streams = arm_logits(arm, data, index, level.device, level.half)
        wrong_words = (logits.argmax(-1) != truth).cpu()
        page, position = (streams.target >= 0).nonzero(as_tuple=True)
        question = streams.branch[page, position].cpu()
        page = page.cpu()
        wrong = torch.zeros(len(index), int(streams.branch.max()) + 1).index_put_(
            (page, question), wrong_words.float(), accumulate=True
        )
        exists = torch.zeros_like(wrong).index_put_((page, question), torch.ones(len(page)))
        task = data.pages.tasks[index]
        right.index_add_(0, task, (exists * (wrong == 0)).sum(1))
        asked.index_add_(0, task, exists.sum(1))
    return {name: round((right[i] / asked[i]).item(), 5) for i, name in enumerate(tasks)}


def train_arm(arm: Arm, world: World, seed: int, bars: Bars) -> dict[str, Any]:
    """Trains an arm in place; equal seeds show equal pages in every arm.

    Returns:
        The "curve": losses (means over the steps between checks), steps and validation accuracies by task.
    """
    level = world.level
    recipe = level.arm if arm.spec.lr is None else replace(level.arm, lr=arm.spec.lr)
    generator = torch.Generator().manual_seed(seed)
    steps: list[int] = []
    accuracies: list[dict[str, float]] = []

    def loss_of_step() -> Tensor:
        index = torch.randint(len(world.train.pages), (recipe.batch,), generator=generator)
        logits, truth, _ = arm_logits(arm, world.train, index, level.device, level.half)
        return F.cross_entropy(logits, truth)

    def check(step: int) -> None:
        if (step + 1) % level.check_every == 0 or step + 1 == recipe.steps:
            steps.append(step + 1)
            accuracies.append(evaluate(arm, world.validation, level, world.tasks))
            arm.model.train()

    arm.model.train()
    losses = optimise(arm.trained(), recipe, bars, loss_of_step, after=check)
    arm.model.eval()
    spans = zip([0, *steps], steps, strict=False)
    return {
        "steps": steps,
        "losses": [round(statistics.fmean(losses[a:b]), 4) for a, b in spans],
        "validation": accuracies,
    }


def run(spec: ArmSpec, seed: int, world: World, bars: Bars) -> tuple[Arm, dict[str, Any]]:
    """Builds, trains and tests an arm.

    Returns:
        The arm and what its line in the results says about this run.
    """
    level = world.level
    arm = build_arm(spec, level.shape, len(world.words), world.pretrained, seed, level.device)
    cpu, wall = time.process_time(), time.perf_counter()
    curve = train_arm(arm, world, seed, bars)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return arm, {
        "tokens": arm.tokens,
        "parameters": arm.parameters,
        "train_cpu_s": round(cpu, 1),
        "train_wall_s": round(wall, 1),
        "curve": curve,
        "test": evaluate(arm, world.test, level, world.tasks),
    }
