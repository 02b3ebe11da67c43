"""What all runs share, made once and kept in a folder under a hash of everything that decides it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vision_remember.synth
from examples.demo.cache import Cache, source_digest

from .arms import Pretrained
from .encoder import Features, encode, pretrain_encoder
from .levels import Level
from .model import TokenPlaces, build_model
from .pages import SYMBOLS_FROM, VALIDATION_FROM, Pages, build_pages, build_words, label_names, task_names
from .symbols import pretrain_decoder
from .train import Set, World

PRETRAINING_SEED = 0
SETS = ("train", "validation", "test")


class Workshop:
    """Makes and keeps the pages, the encoder, the decoder and the features of one level.

    Args:
        level: The level.
        folder: Where results are kept.
    """

    def __init__(self, level: Level, folder: Path) -> None:
        self.level, self.folder = level, folder
        self.words, self.labels, self.tasks = build_words(level), label_names(), task_names(level)
        self._cache = Cache(folder)
        self._base = {
            "pages": source_digest([Path(str(vision_remember.synth.__file__)).parent]),
            "shape": asdict(level.shape),
            "tasks": list(self.tasks),
            "detail": level.detail,
            "text_tokens": level.text_tokens,
        }

    def pages(self, name: str) -> Pages:
        """The pages of "train", "validation", "test" or, without pixels, "symbols"."""
        level = self.level
        per_task, split, first = {
            "train": (level.train_pages, "train", 0),
            "validation": (level.validation_pages, "train", VALIDATION_FROM),
            "test": (level.test_pages, "test", 0),
            "symbols": (level.symbol_pages, "train", SYMBOLS_FROM),
        }[name]

        def make() -> dict[str, Any]:
            total = per_task * len(self.tasks)
            with tqdm(total=total, desc=f"pages: {name}", leave=False) as bar:
                return build_pages(
                    level,
                    self.words,
                    per_task,
                    split=split,
                    first=first,
                    pixels=name != "symbols",
                    progress=bar.update,
                ).state()

        return Pages.from_state(self._kept(f"pages {name}", {"per_task": per_task}, make))

    def encoder(self) -> dict[str, Any]:
        """Stage 1: weights under "model", what it learned under "accuracy"."""
        recipe = self.level.encoder

        def make() -> dict[str, Any]:
            model = build_model(self.level.shape, len(self.words), PRETRAINING_SEED)
            with tqdm(total=recipe.steps, desc="encoder", leave=False) as bar:
                found = pretrain_encoder(
                    model,
                    self.pages("train"),
                    len(self.labels),
                    recipe,
                    PRETRAINING_SEED,
                    _steps(bar),
                    self.level.device,
                )
            return {"model": _weights(model, "vision_tower", True), "accuracy": found}

        return self._kept("encoder", {"recipe": asdict(recipe), "pages": self.level.train_pages}, make)

    def decoder(self) -> dict[str, Any]:
        """Stage 2: weights under "model", the token places' under "places", and the "curve"."""
        recipe = self.level.decoder

        def make() -> dict[str, Any]:
            model = build_model(self.level.shape, len(self.words), PRETRAINING_SEED)
            places = TokenPlaces(self.level.shape.grid, self.level.shape.text_width)
            with tqdm(total=recipe.steps, desc="decoder", leave=False) as bar:
                curve = pretrain_decoder(
                    model,
                    places,
                    self.pages("symbols"),
                    self.labels,
                    self.words,
                    recipe,
                    PRETRAINING_SEED,
                    _steps(bar),
                    self.level.device,
                )
            weights = _weights(model, "vision_tower", False)
            return {"model": weights, "places": places.cpu().state_dict(), "curve": curve}

        return self._kept("decoder", {"recipe": asdict(recipe), "pages": self.level.symbol_pages}, make)

    def features(self, name: str) -> Features:
        """What the encoder says about "train", "validation" or "test"."""
        recipe = {"recipe": asdict(self.level.encoder), "pages": self.level.train_pages}
        per_task = {s: getattr(self.level, f"{s}_pages") for s in SETS}[name]
        path = self._cache.path(f"features {name}", {**self._base, **recipe, "per_task": per_task})
        if not path.exists():
            model = build_model(self.level.shape, len(self.words), PRETRAINING_SEED)
            model.load_state_dict({**model.state_dict(), **self.encoder()["model"]})
            encode(model, self.pages(name), self.level.device).save(path)
        return Features.load(path)

    def world(self) -> World:
        """All of it, made where it is missing."""
        encoder, decoder = self.encoder(), self.decoder()
        train, validation, test = (Set(self.pages(name), self.features(name)) for name in SETS)
        pretrained = Pretrained({**decoder["model"], **encoder["model"]}, decoder["places"])
        return World(self.level, self.words, self.tasks, pretrained, train, validation, test)

    def facts(self) -> dict[str, Any]:
        """What the stages before the arms came to."""
        return {"encoder": self.encoder()["accuracy"], "decoder": self.decoder()["curve"]}

    def _kept(self, stage: str, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self._cache.get(stage, self._base | key, make, on_hit=lambda: None)


def prepare(level: Level, folder: Path, jobs: int) -> None:
    """Makes everything, encoder and decoder side by side where two processes are allowed."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(_stage, level, folder, name) for name in ("decoder", "encoder")]:
            done.result()
        pool.submit(_stage, level, folder, "world").result()


def _stage(level: Level, folder: Path, name: str) -> None:
    torch.set_num_threads(level.threads)
    getattr(Workshop(level, folder), name)()


def _steps(bar: tqdm[Any]) -> Iterable[tqdm[Any]]:
    for _ in range(int(bar.total)):
        yield bar
        bar.update()


def _weights(model: torch.nn.Module, part: str, inside: bool) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in model.state_dict().items() if (part in name) == inside}
