"""Stage 3: every arm learns to answer questions about pages, under one recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .arms import Arm
from .models import WINDOW
from .pages import Pages
from .questions import KINDS, QUESTIONS, VOCABULARY, answers, pack, sample_columns
from .schedule import Bars, Recipe, optimise


@dataclass(frozen=True)
class ArmRecipe(Recipe):
    """How an arm is trained.

    Attributes:
        letters: Letters asked per page and step, besides all other questions.
        check_every: Steps between two points of the accuracy curve.
    """

    steps: int = 150
    batch: int = 24
    letters: int = 24
    check_every: int = 25


@dataclass(frozen=True)
class Curve:
    """What a training run looked like.

    Attributes:
        losses: Loss of every step.
        steps: Where accuracy was checked.
        accuracies: Accuracy per kind at those steps, on validation pages.
    """

    losses: list[float]
    steps: list[int]
    accuracies: list[dict[str, float]]


def question_logits(arm: Arm, pages: Pages, columns: Tensor) -> Tensor:
    """The model's logits to every question: columns (B, questions) -> (B, questions, vocabulary)."""
    packed = pack(columns, arm.vision_tokens, WINDOW)
    return arm.model(
        input_ids=packed.input_ids,
        pixel_values=pages.pixel_values(),
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        logits_to_keep=columns.shape[1],
        use_cache=False,
    ).logits


def train_arm(arm: Arm, train: Pages, validation: Pages, recipe: ArmRecipe, seed: int, bars: Bars) -> Curve:
    """Trains an arm in place; equal seeds ask equal questions about equal pages in every arm."""
    generator = torch.Generator().manual_seed(seed)
    truth = answers(train)
    steps, accuracies = [], []

    def loss_of_step() -> Tensor:
        index = torch.randint(len(train), (recipe.batch,), generator=generator)
        columns = sample_columns(recipe.batch, recipe.letters, generator)
        logits = question_logits(arm, train[index], columns)
        return F.cross_entropy(logits.flatten(0, 1), truth[index].gather(1, columns).flatten())

    def check(step: int) -> None:
        if (step + 1) % recipe.check_every == 0 or step + 1 == recipe.steps:
            steps.append(step + 1)
            accuracies.append(accuracy(predict(arm, validation), validation))
            arm.model.train()

    arm.model.train()
    losses = optimise(arm.model.parameters(), recipe, bars, loss_of_step, after=check)
    arm.model.eval()
    return Curve(losses, steps, accuracies)


@torch.no_grad()
def predict(arm: Arm, pages: Pages, batch: int = 64) -> Tensor:
    """The arm's answer to every question about every page: token ids (N, len(QUESTIONS))."""
    arm.model.eval()
    every = torch.arange(len(QUESTIONS))
    chunks = [pages[start : start + batch] for start in range(0, len(pages), batch)]
    return torch.cat([question_logits(arm, chunk, every.expand(len(chunk), -1)).argmax(-1) for chunk in chunks])


def accuracy(predictions: Tensor, pages: Pages) -> dict[str, float]:
    """Share of right answers per kind of question; predictions (N, len(QUESTIONS)) are token ids."""
    right = (predictions == answers(pages)).float()
    return {kind.name: right[:, list(kind.columns)].mean().item() for kind in KINDS}


@torch.no_grad()
def read_page(arm: Arm, pages: Pages, index: int) -> list[str]:
    """One page as a user would ask about it: every question its own prompt, through the processor and `generate`."""
    prompts = [f"<image> {question}" for question in QUESTIONS]
    image = pages.image(index)
    inputs = arm.processor(text=prompts, images=[image] * len(prompts), return_tensors="pt")
    output = arm.model.generate(**inputs, max_new_tokens=1, do_sample=False)  # type: ignore[misc]
    return [VOCABULARY[token] for token in output[:, -1].tolist()]
