"""Loads a base model from its name, as commands do that take no Python."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vision_remember.adapters.attachment import NAME
from vision_remember.adapters.repo_id import is_repo_id

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    adapter_follows: bool = False,
) -> PreTrainedModel:
    """The base model in evaluation mode, on its device.

    Args:
        name: hub id or folder.
        revision: on the hub.
        dtype: "auto" (the checkpoint's), or a name in ``DTYPES``.
        attn_implementation: as for ``from_pretrained``; None leaves the choice to transformers.
        device: "cpu", "cuda", "cuda:1" ...; None takes the GPU of this process if there is one.
        device_map: as for ``from_pretrained``, in the place of ``device``.
        adapter_follows: an adapter will be loaded onto it.

    Raises:
        ValueError: a dtype or a device that does not exist, both ways to place the model, or weights of Vision Remember
            in the model's own files, which transformers alone would leave out without an error.
        FileNotFoundError: the name is neither a folder nor one that the hub could have.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected auto, {', '.join(DTYPES)}")
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r}: expected at most one of them")
    if device is not None:
        check_device(device)
    if not os.path.isdir(name) and not is_repo_id(name):
        raise FileNotFoundError(f"{name} is neither a folder nor a repository id (owner/name)")
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    wanted = {"revision": revision, "attn_implementation": attn_implementation, "device_map": device_map}
    given = {key: value for key, value in wanted.items() if value is not None}
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        name, dtype=DTYPES.get(dtype, dtype), output_loading_info=True, **given
    )
    model, info = loaded
    if not adapter_follows:
        refuse_blocks(name, info["unexpected_keys"])
    model.eval()
    if device_map is None:
        model.to(device or "cpu")
    placed: PreTrainedModel = model
    return placed


def refuse_blocks(name: str, weights: Collection[str]) -> None:
    """Refuses weights of Vision Remember in a model's own files: transformers leaves them out without an error.

    Args:
        name: of the model, for the message.
        weights: names in its files.

    Raises:
        ValueError: some are weights of Vision Remember.
    """
    blocks = sorted(key for key in weights if f".{NAME}." in key)
    if blocks:
        raise ValueError(
            f"{name} holds {len(blocks)} weights of Vision Remember ({blocks[0]}, ...), but there is no "
            "adapter to say how they are attached: give one, as save_pretrained of the handle wrote it"
        )


def check_device(device: str) -> None:
    """Looks whether tensors can be put there, before a model is loaded for it.

    Raises:
        ValueError: it is no name of a device, or this build of torch or this machine has none.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises them all
        raise ValueError(
            f"device {device!r}: expected one that this machine has, such as cpu: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says first, for a message of one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
