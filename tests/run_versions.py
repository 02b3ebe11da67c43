"""Runs the default tests with the oldest and the newest version of the window, each in an environment of its own.

    make test-versions
    python -m tests.run_versions oldest        # only this row
    python -m tests.run_versions oldest-torch  # several gigabytes where no CPU build of it is to be had

All other packages are those of ``constraints.txt``. The environments stay in ``.venv-versions`` for the next time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

from vision_remember.adapters.versions import WINDOWS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-versions"
TRANSFORMERS, TORCH = WINDOWS
# transformers dropped Python 3.10 inside the window; there, the oldest is also the newest.
NEWEST = TRANSFORMERS.newest if sys.version_info >= (3, 11) else TRANSFORMERS.oldest
ROWS = {
    "oldest": (TRANSFORMERS.oldest, TORCH.newest),
    "newest": (NEWEST, TORCH.newest),
    "oldest-torch": (NEWEST, TORCH.oldest),
}
DEFAULT = ("oldest", "newest")


def environment(transformers: str, torch: str) -> Path:
    """The Python of an environment with these versions and everything else as constrained."""
    folder = FOLDER / f"transformers-{transformers}-torch-{torch}"
    python = folder / "bin" / "python"
    ready = folder / ".installed"
    if not ready.exists():
        venv.create(folder, clear=True, with_pip=True)
        pins = re.sub(r"(?m)^(transformers|torch)==.*\n", "", (ROOT / "constraints.txt").read_text())
        constraints = folder / "constraints.txt"
        constraints.write_text(f"{pins}transformers=={transformers}\ntorch=={TORCH.newest}\n")
        install = [python, "-m", "pip", "install", "-qq"]
        subprocess.run([*install, "--constraint", constraints, "--editable", ".[dev]"], check=True, cwd=ROOT)
        if torch != TORCH.newest:  # by itself: it brings a Triton older than the one that our kernels ask for
            subprocess.run([*install, f"torch=={torch}"], check=True, cwd=ROOT)
        ready.touch()
    return python


def run(python: Path) -> tuple[int, str]:
    """The exit status of the default tests, and pytest's last line."""
    options = ["-q", "-n", "auto", "--maxprocesses", "4", "--dist", "worksteal", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [python, "-m", "pytest", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        if line.startswith(("FAILED", "ERROR")):
            print(f"  {line.rstrip()}", flush=True)
        last = line.strip() or last
    return process.wait(), last.strip("= ")


def main(rows: list[str]) -> int:
    """The exit status: 1 if a row fails."""
    unknown = set(rows) - ROWS.keys()
    if unknown:
        raise SystemExit(f"rows {sorted(unknown)}: expected some of {', '.join(ROWS)}")
    results = {}
    for row in rows:
        print(f"{row}: transformers {ROWS[row][0]}, torch {ROWS[row][1]}", flush=True)
        results[row] = run(environment(*ROWS[row]))
    print(f"\n{'row':<14}{'transformers':<14}{'torch':<10}tests")
    for row, (_, summary) in results.items():
        print(f"{row:<14}{ROWS[row][0]:<14}{ROWS[row][1]:<10}{summary}")
    return int(any(status for status, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(DEFAULT)))
