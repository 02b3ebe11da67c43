"""Results of finished stages on disk, so that a second run is quick."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers


def source_digest(paths: Iterable[Path]) -> str:
    """Digest of source files; a folder stands for all Python files under it."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


class Cache:
    """Keeps each stage's result under its name and everything that could change it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, key: dict[str, Any], make: Callable[[], Any], on_hit: Callable[[], None]) -> Any:
        """The kept result, or a new one, which is then kept. Results are tensors and plain data in dicts and lists."""
        path = self.path(name, key)
        if path.exists():
            on_hit()
            return torch.load(path, weights_only=True)
        result = make()
        unfinished = path.with_suffix(".tmp")
        torch.save(result, unfinished)
        unfinished.replace(path)
        return result

    def path(self, name: str, key: dict[str, Any]) -> Path:
        """Where the result of a name and key is kept."""
        known = {**key, "torch": torch.__version__, "transformers": transformers.__version__}
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        words = "".join(letter if letter.isalnum() else " " for letter in name).split()
        return self._directory / f"{'-'.join(words)}-{digest[:12]}.pt"
