"""Command line: `python -m examples.demo [--seeds 2] [--out demo] [--threads 1] [--quick]`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from .report import write_report
from .run import run
from .settings import full, quick


def main(arguments: list[str] | None = None) -> Path:
    """Runs the demo; returns the path of its report."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="training runs per arm (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where results go (default: demo)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1: numbers repeat)")
    parser.add_argument("--quick", action="store_true", help="run in seconds and learn nothing, to see that all works")
    options = parser.parse_args(arguments)
    for name in ("seeds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")

    torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    settings = quick(options.seeds) if options.quick else full(options.seeds)
    report = write_report(run(settings, options.out / "cache"), options.out)
    print(f"report: {report}")
    return report


if __name__ == "__main__":
    main()
