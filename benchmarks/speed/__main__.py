"""Runs suites, prints a table, and writes JSON and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.speed import absorb, block, capture, op, train, ttft
from benchmarks.speed.hosts import DECODERS
from benchmarks.speed.measure import Plan, about
from benchmarks.speed.report import show, write

SUITES = {
    "op": op.run,
    "absorb": absorb.run,
    "block": block.run,
    "ttft": ttft.run,
    "train": train.run,
    "capture": capture.run,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, action="append", help="may be given several times; all without it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (%(default)s)")
    parser.add_argument("--repeats", type=int, default=11, help="interleaved repeats (11)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU (1)")
    parser.add_argument(
        "--decoder",
        choices=DECODERS,
        action="append",
        default=[],
        help="for ttft; may be given several times (Qwen2-0.5B)",
    )
    parser.add_argument(
        "--tiles",
        type=int,
        action="append",
        default=[],
        help="for ttft: images in the one prompt; may be given several times (1, on a GPU 1 and 5)",
    )
    parser.add_argument("--arm", action="append", default=[], help="for ttft: measure these beside the first, not all")
    parser.add_argument("--small", action="store_true", help="miniature sizes, to see that a suite runs")
    parser.add_argument("--graphs", action="store_true", help="on a GPU, time replays of CUDA graphs, not calls")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="folder of the files and plots (%(default)s)"
    )
    given = parser.parse_args(arguments)
    for name in ("repeats", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: expected at least 1")
    if min(given.tiles, default=1) < 1:
        parser.error(f"--tiles {min(given.tiles)}: expected at least 1")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if given.graphs and given.device != "cuda":
        parser.error("--graphs: expected with --device cuda")
    torch.set_num_threads(given.threads)
    plan = Plan(given.device, given.repeats, given.small, graphs=given.graphs)
    first_token = partial(ttft.run, decoders=given.decoder, tiles=given.tiles, names=given.arm)
    for suite in given.suite or SUITES:
        results = (first_token if suite == "ttft" else SUITES[suite])(plan)
        show(results)
        chosen = [*given.decoder, *(f"x{count}" for count in given.tiles)] if suite == "ttft" else []
        name = "_".join([suite, *chosen, *(["graphs"] if given.graphs else [])])
        write(given.output / f"speed_{given.device}_{name}.json", {"suite": suite, **about(plan)}, results)


if __name__ == "__main__":
    main()
