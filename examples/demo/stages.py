"""The three stages of training, each read from the cache if it was run before."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vision_remember
import vision_remember.adapters

from .arms import ARMS, Pretrained, build_arm
from .cache import Cache, source_digest
from .encoder import pretrain_encoder
from .lookup import pretrain_lookup
from .models import TEXT_WIDTH, TokenPlaces, build_model
from .pages import render_pages
from .schedule import Progress
from .settings import Settings
from .train import accuracy, predict, read_page, train_arm

TRAIN_SEED, TEST_SEED, VALIDATION_SEED = 1, 2, 3
PRETRAINING_SEED = 0
SHOWN_PAGE = 0

# Seconds on one CPU core with the full settings; they only apportion the bar of the whole demo.
ENCODER_COST, DECODER_COST, ARM_COST, UNCOMPRESSED_COST = 45, 65, 40, 65

HERE = Path(__file__).parent
LIBRARY = [Path(str(package.__file__)).parent for package in (vision_remember, vision_remember.adapters)]


def _digest(*names: str) -> str:
    return source_digest(HERE / f"{name}.py" for name in names)


class Stages:
    """Runs encoder, decoder and arms.

    Attributes:
        runs: Every (arm, seed), in the order in which they train.
        test: The test pages.
    """

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._settings, self._cache = settings, Cache(directory)
        self.runs = [(name, seed) for seed in settings.seeds for name in ARMS]
        costs: dict[str, float] = {"encoder": ENCODER_COST, "decoder": DECODER_COST}
        for name, seed in self.runs:
            costs[_title(name, seed)] = UNCOMPRESSED_COST if name == "uncompressed" else ARM_COST
        self._progress = Progress(costs)

        self._train = render_pages(settings.train_pages, TRAIN_SEED)
        self._validation = render_pages(settings.validation_pages, VALIDATION_SEED)
        self.test = render_pages(settings.test_pages, TEST_SEED)
        self._common = {
            "source": _digest("pages", "questions", "models", "schedule"),
            "train_pages": settings.train_pages,
        }

    def close(self) -> None:
        """Ends the progress bars."""
        self._progress.close()

    def encoder(self) -> dict[str, Any]:
        """Stage 1: the vision tower's weights under "model", and what it learned under "accuracy"."""

        def make() -> dict[str, Any]:
            model = build_model(PRETRAINING_SEED)
            bars = self._progress.steps("encoder", recipe.steps)
            found = pretrain_encoder(model.model.vision_tower, self._train, recipe, PRETRAINING_SEED, bars)
            weights = {name: tensor for name, tensor in model.state_dict().items() if "vision_tower" in name}
            return {"model": weights, "accuracy": found}

        recipe = self._settings.encoder
        return self._kept("encoder", {"recipe": asdict(recipe), "own": _digest("encoder")}, make)

    def decoder(self) -> dict[str, Any]:
        """Stage 2: the decoder's weights under "model", the token places' under "places", and "accuracy"."""

        def make() -> dict[str, Any]:
            model, places = build_model(PRETRAINING_SEED), TokenPlaces(TEXT_WIDTH)
            bars = self._progress.steps("decoder", recipe.steps)
            found = pretrain_lookup(model, places, recipe, PRETRAINING_SEED, bars)
            weights = {name: tensor for name, tensor in model.state_dict().items() if "vision_tower" not in name}
            return {"model": weights, "places": places.state_dict(), "accuracy": found}

        recipe = self._settings.lookup
        return self._kept("decoder", {"recipe": asdict(recipe), "own": _digest("lookup")}, make)

    def arm(self, name: str, seed: int, pretrained: Pretrained) -> dict[str, Any]:
        """Stage 3: an arm's "model" weights, its "curve", "accuracy" on test pages, "reading" of one, "seconds"."""

        def make() -> dict[str, Any]:
            start = time.perf_counter()
            arm = build_arm(name, pretrained, seed)
            bars = self._progress.steps(_title(name, seed), settings.arm.steps)
            curve = train_arm(arm, self._train, self._validation, settings.arm, seed, bars)
            seconds = time.perf_counter() - start
            return {
                "model": {key: tensor for key, tensor in arm.model.state_dict().items() if "vision_tower" not in key},
                "curve": asdict(curve),
                "accuracy": accuracy(predict(arm, self.test), self.test),
                "reading": read_page(arm, self.test, SHOWN_PAGE),
                "seconds": round(seconds, 1),
            }

        settings = self._settings
        key = {
            "own": _digest("encoder", "lookup", "arms", "train"),
            "library": source_digest(LIBRARY),
            "recipes": [asdict(recipe) for recipe in (settings.encoder, settings.lookup, settings.arm)],
            "pages": [settings.validation_pages, settings.test_pages],
            "arm": name,
            "seed": seed,
        }
        return self._kept(_title(name, seed), key, make)

    def _kept(self, stage: str, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self._cache.get(stage, self._common | key, make, on_hit=lambda: self._progress.skip(stage))


def _title(name: str, seed: int) -> str:
    return f"{name}, seed {seed}"
