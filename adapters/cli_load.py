"""Models, processors and pictures by the names that a command line has for them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision_remember.adapters.attach import attach_vision_remember
from vision_remember.adapters.base_model import DTYPES, check_device, first_line, load_base_model
from vision_remember.adapters.checkpoint import read_adapter
from vision_remember.adapters.cli_common import Choices, say
from vision_remember.adapters.compress import compress_projector
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.load import adapter_folder, load_vision_remember
from vision_remember.adapters.rehearsal import wrong_values
from vision_remember.adapters.resolve import resolve
from vision_remember.adapters.skeleton import build_skeleton, give_storage
from vision_remember.adapters.spec import MLLMSpec
from vision_remember.config import VisionRememberConfig

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")


def load_config(name: str, revision: str | None) -> Any:
    """The configuration of MODEL.

    Raises:
        ValueError: it is no model of images and text, or has no configuration at all.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    _quiet()
    if _is_path(name) and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} has no config.json: expected a repository id of the hub, or a model's folder")
    try:
        with loading(name):
            config = AutoConfig.from_pretrained(name, revision=revision)
    except OSError as error:
        where = name if _is_path(name) else f"{name} is no folder here, and as a repository of the hub"
        raise ValueError(f"{where}: {first_line(error)}") from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"{name} is a {config.model_type!r}, which is no image-text-to-text model of transformers")
    return config


def load_model(name: str, revision: str | None, *, device: str, dtype: str, adapter_follows: bool) -> Any:
    """MODEL in eval mode; with random weights if its folder has none.

    Raises:
        ValueError: it cannot be loaded, or an unknown dtype or device.
    """
    from transformers import AutoModelForImageTextToText

    config = load_config(name, revision)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    try:
        check_device(device)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    if not _is_path(name) or any(path for pattern in _WEIGHTS for path in Path(name).glob(pattern)):
        say(f"loading {name}")
        with loading(name):
            return load_base_model(name, revision=revision, dtype=dtype, device=device, adapter_follows=adapter_follows)
    say(f"{name} has no weights: random ones are used, and answers mean nothing")
    with loading(name), torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=DTYPES.get(dtype, config.dtype))
    model.config._name_or_path = name
    return model.to(device).eval()


def load_processor(name: str, revision: str | None) -> Any:
    """The processor of MODEL.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoProcessor

    try:
        with loading(name):
            processor = AutoProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no processor that can be loaded: {first_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{name} has no image processor, only a {type(processor).__name__}")
    return processor


def load_picture(path: Path) -> Any:
    """A picture, RGB, the way up that its camera says; 16 bits of grey become 8.

    Raises:
        ValueError: no picture there, or one whose numbers do not say what is white.
    """
    from PIL import Image, ImageOps

    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode.startswith("I;16"):
            # Pillow alone would make white of all but the darkest 256 of the 65,536 levels.
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        elif picture.mode in ("I", "F"):
            raise ValueError(f"mode {picture.mode} has no white: save it with 8 bits")
        return picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read: {first_line(error)}") from error


def attach(model: Any, processor: Any, choices: Choices, spec: MLLMSpec | None = None) -> VisionRememberHandle:
    """Attaches what the options of a command ask for: an adapter, or fresh blocks.

    Args:
        model: The model.
        processor: Its processor; None where no projector is swapped.
        choices: The options.
        spec: The host's names for fresh blocks, where they are known already.
    """
    if choices.adapter is not None:
        return load_vision_remember(model, choices.adapter, processor)
    if choices.projector is not None:
        compress_projector(model, processor, choices.projector, ratio=choices.ratio)
    return attach_vision_remember(
        model, choices.layers, levels=choices.levels, preset=choices.preset, spec=spec, **choices.overrides
    )


def attached_skeleton(name: str, revision: str | None, choices: Choices) -> tuple[Any, VisionRememberHandle]:
    """MODEL without weights but with blocks: the model, and the handle. The blocks have an adapter's weights, if any.

    Raises:
        ValueError: as attaching does.
    """
    config = load_config(name, revision)
    say(f"building {name} without its weights")
    with loading(name):
        model = build_skeleton(config)
    model.config._name_or_path = name
    adapter = None if choices.adapter is None else read_adapter(adapter_folder(choices.adapter))
    with wrong_values() if adapter else nullcontext():
        parts = resolve(model, None if adapter is None else adapter.spec)
    layers = adapter.config.layers if adapter else tuple(choices.layers or VisionRememberConfig().layers)
    # The blocks take device and dtype from the layers that they stand before.
    for index in layers:
        if 0 <= index < len(parts.layers):
            give_storage(parts.layers[index])
    processor = None
    if choices.projector is not None or (adapter is not None and adapter.projector is not None):
        processor = load_processor(name, revision)
    # A spec that was found out by trying describes the model's own projector.
    return model, attach(model, processor, choices, None if choices.projector is not None else parts.spec)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Makes one ValueError, which names MODEL, of the many kinds that damaged files set off inside transformers."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"{name} has a file that cannot be used, or is too large: {reason}") from error


def _is_path(name: str) -> bool:
    return Path(name).is_dir() or name.startswith((".", "/")) or name.count("/") > 1


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
