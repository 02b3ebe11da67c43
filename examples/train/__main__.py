"""Trains LLaVA-VR, or another LLaVA with Vision Remember.

    python -m examples.train --backend loop --config examples/configs/tiny.yaml --output_dir run

--backend is loop (plain PyTorch), trainer (transformers) or trl (SFTTrainer); all other flags are the same, and listed
by --help behind it. Several GPUs: `accelerate launch --config_file examples/configs/fsdp2.yaml -m examples.train ...`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback

BACKENDS = {"loop": "loop", "trainer": "with_trainer", "trl": "with_trl"}


def main(argv: list[str] | None = None) -> list[float]:
    """Trains; returns the losses that were logged.

    Args:
        argv: flags; None for the command line's.
    """
    parser = argparse.ArgumentParser(
        "python -m examples.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--backend", choices=list(BACKENDS), help="what trains; --help behind it lists all flags")
    chosen, rest = parser.parse_known_args(argv)
    if chosen.backend is None:
        if not {"-h", "--help"}.isdisjoint(rest):
            parser.print_help()
            raise SystemExit(0)
        parser.error(f"expected --backend and one of {', '.join(BACKENDS)}")
    backend = importlib.import_module(f"examples.train.{BACKENDS[chosen.backend]}")
    losses: list[float] = backend.main(rest)
    if losses:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


def told(error: Exception) -> bool:
    """Whether an error is one of ours, whose message says what a user can mend: then no traceback is needed."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals["__name__"].startswith(("examples.", "vision_remember."))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as mistake:
        if os.environ.get("VISION_REMEMBER_TRACEBACK") or not told(mistake):
            raise
        print(f"Error: {mistake}", file=sys.stderr)
        sys.exit(2)
