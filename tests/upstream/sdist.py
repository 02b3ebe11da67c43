"""The tests that a library ships in its source distribution, downloaded once and imported under a name of their own."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

CACHE = Path(__file__).parents[2] / ".venv-upstream"
"""Git ignores it, and ``make clean`` removes it."""


def fetch(distribution: str) -> Path:
    """The folder ``tests`` of the installed version's source distribution."""
    version = importlib.metadata.version(distribution)
    root = CACHE / f"{distribution}-{version}"
    if not root.is_dir():
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", ":all:", "--dest", str(CACHE), f"{distribution}=={version}"]
        subprocess.run(command, check=True)
        # Under its name only when it is whole.
        with tempfile.TemporaryDirectory(dir=CACHE) as unpacked:
            with tarfile.open(CACHE / f"{root.name}.tar.gz") as archive:
                archive.extractall(unpacked, filter="data")
            Path(unpacked, root.name).rename(root)
    return root / "tests"


def import_tests(folder: Path, package: str, module: str, stand_ins: Mapping[str, Mapping[str, Any]]) -> ModuleType:
    """A module of the shipped tests.

    Args:
        folder: of the tests.
        package: the name that the folder gets; ours is called ``tests``, as theirs is.
        module: its name in the folder.
        stand_ins: what it imports and cannot have, by module and name. A leading dot means inside the package.
    """
    root = ModuleType(package)
    root.__path__ = [str(folder)]
    sys.modules[package] = root
    for name, contents in stand_ins.items():
        full = f"{package}{name}" if name.startswith(".") else name
        stand_in = ModuleType(full)
        stand_in.__path__ = []
        vars(stand_in).update(contents)
        sys.modules[full] = stand_in
    return importlib.import_module(f"{package}.{module}")
