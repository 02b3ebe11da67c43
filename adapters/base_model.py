"""Loads a base model from its name, as commands do that take no Python."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vision_remember.adapters.attachment import NAME

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
        ValueError: a dtype that does not exist, both ways to place the model, or weights of Vision Remember in the
            model's own files, which transformers alone would leave out without an error.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected auto, {', '.join(DTYPES)}")
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r}: expected at most one of them")
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    wanted = {"revision": revision, "attn_implementation": attn_implementation, "device_map": device_map}
    given = {key: value for key, value in wanted.items() if value is not None}
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        name, dtype=DTYPES.get(dtype, dtype), output_loading_info=True, **given
    )
    model, info = loaded
    left_out = [key for key in info["unexpected_keys"] if f".{NAME}." in key]
    if left_out and not adapter_follows:
        raise ValueError(
            f"{name} holds {len(left_out)} weights of Vision Remember ({sorted(left_out)[0]}, ...), but there is no "
            "adapter to say how they are attached: give one, as save_pretrained of the handle wrote it"
        )
    model.eval()
    if device_map is None:
        model.to(device or "cpu")
    placed: PreTrainedModel = model
    return placed
