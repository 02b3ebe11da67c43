"""How large the demo is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .encoder import EncoderRecipe
from .lookup import LookupRecipe
from .train import ArmRecipe


@dataclass(frozen=True)
class Settings:
    """Everything that decides the demo's numbers, besides the code.

    Attributes:
        seeds: Each draws an arm's projector and blocks and the order of its data.
        train_pages: Pages to train on, encoder and arms alike.
        validation_pages: Pages behind the accuracy curves.
        test_pages: Pages behind the table; looked at once, after training.
        encoder: Recipe of stage 1.
        lookup: Recipe of stage 2.
        arm: Recipe of stage 3.
        prefill_repeats: Timed forward passes per arm.
        quick: Whether this is a run that learns nothing.
    """

    seeds: tuple[int, ...] = (0, 1)
    train_pages: int = 6144
    validation_pages: int = 64
    test_pages: int = 512
    encoder: EncoderRecipe = field(default_factory=EncoderRecipe)
    lookup: LookupRecipe = field(default_factory=LookupRecipe)
    arm: ArmRecipe = field(default_factory=ArmRecipe)
    prefill_repeats: int = 25
    quick: bool = False


def full(seeds: int) -> Settings:
    """The demo as its report describes it."""
    return Settings(seeds=tuple(range(seeds)))


def quick(seeds: int) -> Settings:
    """Every step of the demo in a few seconds. Nothing is learned: this only shows that everything runs."""
    settings = full(seeds)
    return replace(
        settings,
        train_pages=64,
        validation_pages=8,
        test_pages=16,
        encoder=replace(settings.encoder, steps=3, batch=4),
        lookup=replace(settings.lookup, steps=8, batch=4),
        arm=replace(settings.arm, steps=4, batch=4, check_every=2),
        prefill_repeats=2,
        quick=True,
    )
