"""The steps of docs/extending.md, followed one by one on a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = {section.splitlines()[0]: section for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}
FOLLOWED = [name for name, section in SECTIONS.items() if "```" in section]


@pytest.fixture(name="copy")
def a_copy_of_the_repository(tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


def run(command: list[str], copy: Path, given: str | None = None) -> None:
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, input=given, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"


def test_the_page_has_what_is_followed() -> None:
    assert FOLLOWED == ["A projector", "An interaction", "A host", "A model of your own"]


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_steps_of_a_section(name: str, copy: Path) -> None:
    followed = {"python": 0, "diff": 0, "bash": 0}
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", SECTIONS[name], re.DOTALL | re.MULTILINE):
        followed[kind] += 1
        if kind == "python":
            first, _, text = block.partition("\n")
            file = copy / first.removeprefix("# file: ")
            assert not file.exists()
            file.write_text(text)
            run([sys.executable, "-m", "ruff", "check", str(file)], copy)
            run([sys.executable, "-m", "ruff", "format", "--check", str(file)], copy)
        elif kind == "diff":
            run(["git", "apply", "--recount", "-"], copy, block)
        else:
            for line in block.splitlines():
                run([sys.executable, *line.split()[1:], *(["-q"] if "pytest" in line else [])], copy)
    assert all(followed[kind] for kind in ("python", "bash"))
    assert followed["diff"] or name == "A model of your own"  # which no table lists
