"""What all runs share, made once and kept in a folder under a hash of everything that decides it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vision_remember.saliency
import vision_remember.synth
import vision_remember.tap
from examples.demo import schedule
from examples.demo.cache import Cache, source_digest

from .arms import Pretrained
from .encoder import Features, encode, pretrain_encoder
from .levels import Level
from .model import TokenPlaces, build_model
from .pages import SYMBOLS_FROM, VALIDATION_FROM, Pages, build_pages, build_words, label_names, task_names
from .symbols import pretrain_decoder
from .train import Set, World

PRETRAINING_SEED = 0
SOURCES = [
    *(Path(__file__).with_name(f"{name}.py") for name in ("encoder", "model", "pages", "symbols", "words")),
    *(Path(str(module.__file__)) for module in (schedule, vision_remember.tap, vision_remember.saliency)),
    Path(str(vision_remember.synth.__file__)).parent,
]
"""What pages, encoder, features and decoders are made by."""
PART = 64
"""Pages per task that a process draws at a time."""
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
            "sources": source_digest(SOURCES),
            "shape": asdict(level.shape),
            "tasks": list(self.tasks),
            "detail": level.detail,
            "text_tokens": level.text_tokens,
        }

    def pages(self, name: str, pool: Executor | None = None) -> Pages:
        """The pages of "train", "validation", "test" or, without pixels, "symbols"; drawn by a pool if there is one."""
        level = self.level
        per_task, split, first = {
            "train": (level.train_pages, "train", 0),
            "validation": (level.validation_pages, "train", VALIDATION_FROM),
            "test": (level.test_pages, "test", 0),
            "symbols": (level.symbol_pages, "train", SYMBOLS_FROM),
        }[name]

        def make() -> dict[str, Any]:
            starts = range(0, per_task, PART)
            parts = [(level, min(PART, per_task - start), split, first + start, name != "symbols") for start in starts]
            spread = map if pool is None else pool.map
            drawn = []
            with tqdm(total=per_task * len(self.tasks), desc=f"pages: {name}", leave=False) as bar:
                for state in spread(_part, *zip(*parts, strict=True)):
                    drawn.append(Pages.from_state({key: torch.from_numpy(value) for key, value in state.items()}))
                    bar.update(len(drawn[-1]))
            return Pages.joined(drawn).state()

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
                    self.level.half,
                )
            return {"model": _weights(model, "vision_tower", True), "accuracy": found}

        return self._kept("encoder", {"recipe": asdict(recipe), "pages": self.level.train_pages}, make)

    def decoder(self, side: int) -> dict[str, Any]:
        """Stage 2, for tokens of side x side cells.

        Returns:
            Weights under "model", the token places' under "places", and what `pretrain_decoder` returns.
        """
        stages = self.level.decoders_until(side)
        recipe = stages[-1]

        def make() -> dict[str, Any]:
            model = build_model(self.level.shape, len(self.words), PRETRAINING_SEED)
            places = TokenPlaces(self.level.shape.grid, self.level.shape.text_width)
            before = self.decoder(stages[-2].side) if len(stages) > 1 else None
            if before is not None:
                model.load_state_dict({**model.state_dict(), **before["model"]})
                places.load_state_dict(before["places"])
            with tqdm(total=recipe.steps, desc=f"decoder {side}x{side}", leave=False) as bar:
                found = pretrain_decoder(
                    model,
                    places,
                    self.pages("symbols"),
                    self.labels,
                    self.words,
                    self.tasks,
                    recipe,
                    PRETRAINING_SEED,
                    _steps(bar),
                    self.level.device,
                    self.level.half,
                    before and before["label_code"],
                )
            weights = _weights(model, "vision_tower", False)
            return {"model": weights, "places": places.cpu().state_dict(), **found}

        key = {"recipes": [asdict(recipe) for recipe in stages], "pages": self.level.symbol_pages}
        return self._kept(f"decoder {side}", key, make)

    def features(self, name: str) -> Features:
        """What the encoder says about "train", "validation" or "test"."""
        recipe = {"recipe": asdict(self.level.encoder), "pages": self.level.train_pages}
        per_task = {s: getattr(self.level, f"{s}_pages") for s in SETS}[name]
        path = self._cache.path(f"features {name}", {**self._base, **recipe, "per_task": per_task})
        if not path.exists():
            model = build_model(self.level.shape, len(self.words), PRETRAINING_SEED)
            model.load_state_dict({**model.state_dict(), **self.encoder()["model"]})
            encode(model, self.pages(name), self.level.device).save(path)
        return _features(path)

    def world(self, sides: Iterable[int]) -> World:
        """All of it for tokens of such sides, made where it is missing."""
        encoder = self.encoder()["model"]
        decoders = {side: self.decoder(side) for side in sides}
        train, validation, test = (Set(self.pages(name), self.features(name)) for name in SETS)
        pretrained = {
            side: Pretrained({**decoder["model"], **encoder}, decoder["places"]) for side, decoder in decoders.items()
        }
        return World(self.level, self.words, self.tasks, pretrained, train, validation, test)

    def facts(self, sides: Iterable[int]) -> dict[str, Any]:
        """What the stages before the arms came to."""
        decoders = {str(side): self.decoder(side) for side in sides}
        return {
            "encoder": self.encoder()["accuracy"],
            "reads": {side: decoder["reads"] for side, decoder in decoders.items()},
            "curves": {side: decoder["curve"] for side, decoder in decoders.items()},
        }

    def _kept(self, stage: str, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self._cache.get(stage, self._base | key, make, on_hit=lambda: None)


def prepare(level: Level, folder: Path, side: int, pool: Executor) -> None:
    """Makes everything for tokens of side x side cells, encoder and decoder side by side."""
    workshop = Workshop(level, folder)
    workshop.pages("symbols", pool)
    decoder = pool.submit(stage, level, folder, "decoder", side)  # and those that it begins from
    for name in SETS:
        workshop.pages(name, pool)
    for name in SETS:
        pool.submit(stage, level, folder, "features", name).result()  # the first trains the encoder
    decoder.result()


def settle(level: Level) -> None:
    """Makes a process ready for a level: its threads, and how exact products of float32 have to be."""
    torch.set_num_threads(level.threads)
    if level.half:  # what lies outside of autocast may run in TF32
        torch.set_float32_matmul_precision("high")


def _part(level: Level, per_task: int, split: str, first: int, pixels: bool) -> dict[str, Any]:
    """Some pages of every task, as arrays, which travel between processes as plain bytes."""
    pages = build_pages(level, build_words(level), per_task, split=split, first=first, pixels=pixels)
    return {name: value.numpy() for name, value in pages.state().items()}


def stage(level: Level, folder: Path, name: str, *arguments: Any) -> None:
    """Calls a method of the `Workshop`, for what it keeps in the folder."""
    settle(level)
    getattr(Workshop(level, folder), name)(*arguments)


@cache
def _features(path: Path) -> Features:
    """Loaded once in a process: the worlds of all ratios share them, and what of them lies on a GPU."""
    return Features.load(path)


def _steps(bar: tqdm[Any]) -> Iterable[tqdm[Any]]:
    for _ in range(int(bar.total)):
        yield bar
        bar.update()


def _weights(model: torch.nn.Module, part: str, inside: bool) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in model.state_dict().items() if (part in name) == inside}
