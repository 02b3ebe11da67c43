"""``python -m benchmarks.proof``: runs the suites of the proof, as far as their lines are missing."""

from __future__ import annotations

import argparse
from pathlib import Path

from .levels import LEVELS
from .runner import run_suites
from .suites import PAPER_SUITES, RATIOS, SUITES

RESULTS = Path("benchmarks/results")
CACHE = Path("build/proof")


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=__doc__)
    parser.add_argument(
        "--suite",
        choices=[*SUITES, "all"],
        nargs="+",
        default=list(PAPER_SUITES),
        help="what is run (default: the paper's tables and their controls)",
    )
    parser.add_argument("--seeds", type=int, default=2, help="how many, from 0 (default: %(default)s)")
    parser.add_argument(
        "--ratios", type=int, choices=RATIOS, nargs="+", default=list(RATIOS), help="cells per token (default: all)"
    )
    parser.add_argument("--level", choices=list(LEVELS), default="cpu", help="how large (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="JSON lines (default: benchmarks/results/proof_LEVEL.jsonl)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="pages, encoder and decoder (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    suites = list(SUITES) if "all" in options.suite else options.suite
    results = options.results or RESULTS / f"proof_{options.level}.jsonl"
    run_suites(
        suites, range(options.seeds), LEVELS[options.level], options.cache, results, options.jobs, options.ratios
    )


if __name__ == "__main__":
    main()
