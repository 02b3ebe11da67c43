"""Loads an adapter folder onto a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from vision_remember.adapters.attach import attach_vision_remember
from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.checkpoint import (
    adapter_modules,
    check_base,
    copy_weights,
    describe_projector,
    read_adapter,
    same_parts,
)
from vision_remember.adapters.compress import compress_projector
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.rehearsal import rehearse
from vision_remember.adapters.repo_id import is_repo_id
from vision_remember.adapters.resolve import resolve, unwrapped
from vision_remember.adapters.sharding import class_name
from vision_remember.adapters.share import fetch_adapter
from vision_remember.adapters.versions import warn_outside_the_windows


def load_vision_remember(
    model: nn.Module, dir_or_repo: str | os.PathLike[str], processor: Any = None, *, revision: str | None = None
) -> VisionRememberHandle:
    """Attaches a saved adapter to its base model, in place.

    Args:
        model: the base model, as it came from ``from_pretrained``.
        dir_or_repo: an adapter folder, or a repository id of the Hugging Face hub.
        processor: the base model's processor; needed when the adapter holds a projector, whose number of tokens the
            processor has to emit.
        revision: of the repository: a branch, a tag, or a commit, by which nobody can change what you load.

    Returns:
        The handle, as :func:`vision_remember.attach_vision_remember` returns it.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a damaged adapter, one for another base model, or weights that do not fit; the message names what is
            wrong. Model and processor are then as they were.
        RuntimeError: Vision Remember is attached already.
    """
    warn_outside_the_windows()  # attach would blame this line
    if find_attachment(model) is not None:
        raise RuntimeError("Vision Remember is attached to this model already; detach_vision_remember(model) first")
    saved = read_adapter(adapter_folder(dir_or_repo, revision))
    own_spec = class_name(unwrapped(model)) == saved.base.get("class") or not same_parts(saved, unwrapped(model))
    spec = saved.spec if own_spec else None  # of a model that cuts images up, or of one that does not
    parts = rehearse(model, saved, spec)
    # A model of one's own may be built with the adapter's projector: only its weights are missing.
    swaps = saved.projector is not None and saved.projector != describe_projector(parts.projector)
    if swaps and processor is None:
        name = (saved.projector or {}).get("name")
        raise ValueError(
            f"the adapter swaps the projector for {name!r}: pass the model's processor too, so that it emits as many "
            "image tokens"
        )
    compression = None
    if swaps:
        compression = compress_projector(model, processor, spec=spec, **(saved.projector or {}))
    try:
        handle = attach_vision_remember(model, config=saved.config, spec=spec)
        try:
            attachment = find_attachment(model)
            assert attachment is not None
            copy_weights(saved, adapter_modules(attachment, resolve(model, spec)))
        except BaseException:
            handle.detach()
            raise
    except BaseException:
        if compression is not None:
            compression.restore()
        raise
    handle.compression = compression
    return handle


def restore_vision_remember(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Puts the weights of an adapter folder into a model that has the same Vision Remember attached.

    Args:
        model: an attached model, perhaps inside a PEFT model, with the same projector as the adapter.
        folder: as ``save_pretrained`` of the handle wrote it.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a damaged adapter, or one of another base model, configuration or projector. Nothing changed then.
        RuntimeError: nothing is attached.
    """
    attachment = find_attachment(model)
    if attachment is None:
        raise RuntimeError(f"no Vision Remember is attached to this {type(model).__name__}")
    saved, parts = read_adapter(Path(folder)), resolve(model, attachment.spec)
    check_base(saved, parts)
    if saved.config != attachment.config:
        raise ValueError(f"the adapter in {folder} has {saved.config}, but attached is {attachment.config}")
    modules = adapter_modules(attachment, parts)
    projector = describe_projector(modules.get("projector"))
    if saved.projector != projector:  # weights alone do not tell: most have the same for any ratio
        raise ValueError(f"the adapter in {folder} has the projector {saved.projector}, but the model has {projector}")
    copy_weights(saved, modules)


def adapter_folder(dir_or_repo: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of an adapter, fetched if it is a repository.

    Raises:
        FileNotFoundError: neither a folder here nor a repository on the hub.
        ValueError: a revision of a folder.
    """
    path = Path(dir_or_repo)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r}: {path} is a folder, which has no revisions")
        return path
    name = os.fspath(dir_or_repo)
    if not is_repo_id(name):
        raise FileNotFoundError(f"{name} is neither a folder nor a repository id (owner/name)")
    return fetch_adapter(name, revision)
