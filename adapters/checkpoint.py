"""The adapter folder: ``adapter_config.json``, ``adapter_model.safetensors`` and a model card. Never a pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_remember.adapters.attachment import Attachment
from vision_remember.adapters.devices import fetched, refuse_absent
from vision_remember.adapters.model_card import model_card
from vision_remember.adapters.resolve import HostParts, adapted_part, model_type_of, trained_copy
from vision_remember.adapters.sharding import class_name, fill, is_sharded, whole
from vision_remember.adapters.spec import MLLMSpec
from vision_remember.config import VisionRememberConfig
from vision_remember.projectors import Projector, projector_name

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
_FORMAT = "vision-remember"
_FORMAT_VERSION = 1
_MARK = "saved_as"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WITHOUT_TILES = {"LlavaNextForConditionalGeneration": "LlavaForConditionalGeneration"}
"""Classes with the same parts as another, but for the tiles: each takes the other's adapters."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter folder holds.

    Attributes:
        config: the blocks' configuration.
        spec: the host's names.
        base: what the adapter was trained on, see :func:`describe_base`.
        projector: name and options of the swapped projector; None if the host's own was kept.
        tensors: weights by name, "vision_remember.<layer>.<name>" and "projector.<name>".
    """

    config: VisionRememberConfig
    spec: MLLMSpec
    base: dict[str, Any]
    projector: dict[str, Any] | None
    tensors: dict[str, Tensor]


def adapter_modules(attachment: Attachment, parts: HostParts) -> dict[str, nn.Module]:
    """The modules whose weights an adapter holds, by their prefix.

    Raises:
        ValueError: PEFT adapts parts of them, which an adapter cannot hold.
    """
    projector = None if parts.projector is None else trained_copy(parts.projector)
    modules = {f"vision_remember.{index}": trained_copy(block) for index, block in attachment.blocks().items()}
    if isinstance(projector, Projector):
        modules["projector"] = projector
    for prefix, module in modules.items():
        part = adapted_part(module)
        if part is not None:
            raise ValueError(
                f"PEFT has put an adapter around {prefix}.{part}, which no adapter folder can hold: train whole blocks "
                "and projectors by modules_to_save and leave them out of target_modules, or merge_and_unload() first"
            )
    return modules


def savable_modules(attachment: Attachment, parts: HostParts) -> dict[str, nn.Module]:
    """The modules of :func:`adapter_modules`, whose weights can be saved.

    Raises:
        ValueError: as :func:`adapter_modules`, or the blocks' weights are in pieces that nobody here puts together.
    """
    modules = adapter_modules(attachment, parts)
    for prefix, module in modules.items():
        found = {name: tensor.shape for name, tensor in module.state_dict().items()}
        for name, shape in attachment.shapes.items() if prefix != "projector" else ():
            if found.get(name) != shape:
                raise ValueError(
                    f"{prefix}.{name} has shape {tuple(found.get(name, ()))}, but whole it has {tuple(shape)}: an "
                    "adapter is put together from shards of FSDP2 (fully_shard) alone"
                )
    return modules


def describe_base(parts: HostParts) -> dict[str, Any]:
    """The properties of a host that an adapter depends on."""
    config: Any = getattr(parts.model, "config", None)
    return {
        "class": class_name(parts.model),
        "encoder": model_type_of(parts.encoder),
        "feature_grid": list(parts.feature_grid) if parts.feature_grid else None,
        "decoder": model_type_of(parts.decoder),
        "decoder_layers": len(parts.layers),
        "hidden_size": parts.hidden_size,
        "name_or_path": getattr(config, "_name_or_path", "") or None,
    }


def describe_projector(projector: nn.Module | None) -> dict[str, Any] | None:
    """Name and options of a projector of ours; None for any other."""
    if not isinstance(projector, Projector):
        return None
    # As they come back from a file.
    described: dict[str, Any] = json.loads(json.dumps({"name": projector_name(projector), **projector.options()}))
    return described


def save_adapter(
    attachment: Attachment, parts: HostParts, directory: str | os.PathLike[str], *, shown_as: str | None = None
) -> None:
    """Writes an adapter folder aside and then renames it, so that nothing is ever half there.

    A folder that exists keeps what else it holds: there the files are renamed one by one, and a mark in both tells
    files of two saves apart. A write that fails, or is cut short, leaves what was there.

    Of processes that share a model in shards, all have to call this, and the first one writes. ``shown_as`` is what the
    card tells its readers to load; None for a folder.
    """
    modules = savable_modules(attachment, parts)
    mark = uuid4().hex
    description = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        _MARK: mark,
        "base": describe_base(parts),
        "config": attachment.config.to_dict(),
        "projector": describe_projector(modules.get("projector")),
        "spec": attachment.spec.to_dict(),
    }
    held = {
        f"{prefix}.{name}": tensor for prefix, module in modules.items() for name, tensor in fetched(module).items()
    }
    refuse_absent(held, "the adapter", "there is nothing to save")
    tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in held.items()}
    if is_sharded(parts.model) and dist.get_rank() > 0:
        return
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Inside of a folder that exists: it may be a link or a mount, and renaming does not cross file systems.
    with tempfile.TemporaryDirectory(dir=target if target.is_dir() else target.parent, prefix=".saving-") as aside:
        written = Path(aside, "adapter")
        written.mkdir()  # with the usual permissions, unlike a temporary folder
        (written / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
        (written / CARD_FILE).write_text(model_card(description, tensors, shown_as))
        save_file(tensors, written / WEIGHTS_FILE, metadata={"format": "pt", _MARK: mark})
        shutil.copymode(written / CONFIG_FILE, written / WEIGHTS_FILE)  # safetensors lets the owner alone read it
        if target.is_dir():
            for name in (WEIGHTS_FILE, CARD_FILE, CONFIG_FILE):
                os.replace(written / name, target / name)
        else:
            os.rename(written, target)


def read_adapter(folder: Path) -> SavedAdapter:
    """Reads an adapter folder, without any model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, a pickle, or not of this format.
    """
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: not an adapter folder")
    if not weights_file.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise ValueError(f"{folder} holds {pickles}: pickles are never loaded, expected {WEIGHTS_FILE}")
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}")
    try:
        data = json.loads(config_file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config_file} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"{config_file} does not describe a {_FORMAT} adapter")
    if data.get("format_version") != _FORMAT_VERSION:
        raise ValueError(
            f"{config_file} has format_version {data.get('format_version')!r}; this release reads {_FORMAT_VERSION}"
        )
    missing = [key for key in ("base", "config", "spec") if not isinstance(data.get(key), dict)]
    if missing:
        raise ValueError(f"{config_file} lacks {missing}")
    if not isinstance(data.get("projector"), (dict, type(None))):
        raise ValueError(f"{config_file} has projector={data['projector']!r}: expected a description or null")
    try:
        config, spec = VisionRememberConfig.from_dict(data["config"]), MLLMSpec.from_dict(data["spec"])
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{config_file} holds a value of a wrong kind: {error}") from error
    return SavedAdapter(
        config=config,
        spec=spec,
        base=data["base"],
        projector=data.get("projector"),
        tensors=_read_tensors(weights_file, data.get(_MARK)),
    )


def check_base(saved: SavedAdapter, parts: HostParts) -> None:
    """Raises ValueError, naming every difference, if the adapter was made for another kind of model."""
    actual = describe_base(parts)
    different = [
        f"{key}: the adapter expects {saved.base.get(key)!r}, this model has {actual[key]!r}"
        for key in actual
        # The same weights go by many names, and the same parts by two classes.
        if key != "name_or_path" and saved.base.get(key) != actual[key]
        if key != "class" or not same_parts(saved, parts.model)
    ]
    if different:
        raise ValueError(f"the adapter belongs to another base model; {'; '.join(different)}")


def same_parts(saved: SavedAdapter, model: nn.Module) -> bool:
    """Whether an adapter was trained on the model's class, or on the one that differs in cutting images up."""
    before, now = str(saved.base.get("class")), class_name(model)
    return _WITHOUT_TILES.get(before, before) == _WITHOUT_TILES.get(now, now)


def check_weights(saved: SavedAdapter, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of ``modules`` by their names in an adapter, all of which it has.

    Raises:
        ValueError: missing, extra or misshapen tensors, or such as hold no real numbers; the message names them.
    """
    states = {prefix: module.state_dict(keep_vars=True) for prefix, module in modules.items()}
    targets = {f"{prefix}.{name}": tensor for prefix, state in states.items() for name, tensor in state.items()}
    problems = [f"missing {name}" for name in targets if name not in saved.tensors]
    problems += [f"unexpected {name}" for name in saved.tensors if name not in targets]
    problems += [
        f"{name} has shape {tuple(saved.tensors[name].shape)}, expected {tuple(target.shape)}"
        for name, target in targets.items()
        if name in saved.tensors and saved.tensors[name].shape != target.shape
    ]
    problems += [
        f"{name} is {tensor.dtype}, expected float32, float16 or bfloat16"
        for name, tensor in saved.tensors.items()
        if name in targets and tensor.dtype not in _DTYPES and tensor.dtype != targets[name].dtype
    ]
    if problems:
        raise ValueError(f"the adapter's weights do not fit: {'; '.join(map(_shortened, problems))}")
    return targets


def copy_weights(saved: SavedAdapter, modules: dict[str, nn.Module]) -> None:
    """Copies an adapter's weights into ``modules``, all of them or none; raises as :func:`check_weights`."""
    targets = check_weights(saved, modules)
    refuse_absent(targets, "the adapter", "load it before they are offloaded")
    for name, target in targets.items():
        fill(target, saved.tensors[name])


def _shortened(text: str) -> str:
    """A line for a message, whatever a file puts into it."""
    return text if len(text) <= 200 else f"{text[:160]} ... ({len(text)} characters)"


def _read_tensors(file: Path, mark: object) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            own_mark = (tensors.metadata() or {}).get(_MARK)
            if own_mark is not None and mark is not None and own_mark != mark:
                raise ValueError(f"{file} and {CONFIG_FILE} beside it were not saved together: a save was interrupted")
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no readable safetensors file (truncated, or a pickle?): {error}") from error
