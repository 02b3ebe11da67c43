"""Names of a model's weights, read without the weights."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file


def weight_names(name: str, revision: str | None = None) -> list[str]:
    """Names in a model's safetensors files; none where there are no such files, or none can be reached.

    What is on this machine is read; of what is not, the hub sends the files' headers alone.

    Args:
        name: hub id or folder.
        revision: on the hub.

    Raises:
        ValueError: a file that is here and damaged.
    """
    for file in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME):
        try:
            path = cached_file(name, file, revision=revision, local_files_only=True)
        except (OSError, ValueError):  # it is not here
            continue
        assert path is not None
        try:
            if file == SAFE_WEIGHTS_INDEX_NAME:
                return list(json.loads(Path(path).read_text())["weight_map"])
            with safe_open(path, framework="pt") as weights:
                return list(weights.keys())
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return [] if Path(name).is_dir() else _names_on_the_hub(name, revision)


def _names_on_the_hub(name: str, revision: str | None) -> list[str]:
    """What uses the model afterwards says what is wrong with its name or the connection."""
    # HTTPError is of the client that the installed version of the hub's library has, httpx or its successor.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HTTPError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    try:
        return list(HfApi().get_safetensors_metadata(name, revision=revision).weight_map)
    except (OSError, ValueError, HTTPError, NotASafetensorsRepoError, SafetensorsParsingError):
        return []
