"""`vision-remember demo`, `train`, `bench` and `eval`: they start scripts, and pass their arguments on."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from vision_remember.adapters.cli_common import helpful

REPOSITORY = "the source repository of vision-remember"


@helpful
def demo_command(
    context: typer.Context,
    seeds: Annotated[int, typer.Option(min=1, help="Training runs per arm.")] = 2,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report, figures and checkpoints.")] = Path(
        "demo"
    ),
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; with one, a run repeats its numbers.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run in seconds and learn nothing, to see that all works.")
    ] = False,
) -> None:
    """Train small LLaVAs on rendered pages, with and without Vision Remember, and write a report.

    Takes some minutes on a CPU; no network, no weights. The report is `report.html` in the folder --out, the numbers
    are in `results.json` beside it. A run that was cut short goes on where it stopped.

    Examples:

        vision-remember demo

        vision-remember demo --seeds 1 --threads 4 --out results/

        vision-remember demo --quick        # to see that everything works

    Needs `pip install 'vision-remember[demo]'`.
    """
    _refuse(context.args)
    need("demo", "jinja2", "matplotlib", "numpy", "tqdm")
    arguments = ["--seeds", str(seeds), "--out", str(out), "--threads", str(threads), *(["--quick"] if quick else [])]
    start("examples.demo", arguments)


@helpful
def train_command(context: typer.Context) -> None:
    """Train Vision Remember in a model, in the two phases of the paper.

    All arguments go on to the training script: flags of its own and those of transformers' `TrainingArguments`, or a
    YAML file of them (--config FILE), which flags overrule. --backend says what trains: loop (plain PyTorch), trainer
    (transformers) or trl (SFTTrainer).

    Examples:

        vision-remember train --backend loop -- --help      # all of its flags

        vision-remember train --backend loop --model tiny --layers 1 3 --max_steps 60 --output_dir run

        vision-remember train --backend trainer --config examples/configs/tiny.yaml --output_dir run    # in a clone

    Needs `pip install 'vision-remember[train]'`.
    """
    need("train", "accelerate", "datasets", "trl")
    start("examples.train", context.args)


@helpful
def bench_command(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="speed or proof.")],
) -> None:
    """Run the benchmarks: what Vision Remember costs (speed), or what it brings (proof).

    What follows KIND goes on to the benchmark.

    Examples:

        vision-remember bench speed -- --help        # its suites and flags

        vision-remember bench speed --suite op

        vision-remember bench proof --suite table5a

    Needs `pip install 'vision-remember[bench]'`.
    """
    if kind not in ("speed", "proof"):
        raise ValueError(f"KIND {kind!r}: expected 'speed' or 'proof'")
    need("bench", "jinja2", "matplotlib", "numpy", "scipy", "skimage", "sklearn", "tqdm")
    start(f"benchmarks.{kind}", context.args)


@helpful
def eval_command(context: typer.Context) -> None:
    """Evaluate a model with Vision Remember on the paper's 13 benchmarks, by lmms-eval's official tasks.

    All arguments go on to `benchmarks.evaluation`, which writes a result file that says how each score came about, and
    compares it with another one.

    Examples:

        vision-remember eval --pretrained base/ --tasks paper --output without.json

        vision-remember eval --pretrained base/ --adapter a/ --tasks paper --output with.json --baseline without.json

        vision-remember eval -- --help               # all of its flags

    Needs `pip install 'vision-remember[eval]'`. lmms-eval's own command knows the model too: `--model vision_remember`.
    """
    need("eval", "lmms_eval")
    start("benchmarks.evaluation", context.args)


def need(extra: str, *modules: str) -> None:
    """Raises ImportError, naming the extra, if a module is missing."""
    missing = [name for name in modules if name not in sys.modules and importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'vision-remember[{extra}]'")


def start(module: str, arguments: list[str]) -> None:
    """Runs a module as ``python -m`` does, in this process.

    Raises:
        ImportError: this installation does not have it.
    """
    sys.path.insert(0, str(lab_folder()))
    before = sys.argv
    try:
        if _missing(module):
            raise ImportError(
                f"this installation of vision-remember has no {module.replace('.', '/')}: use {REPOSITORY}, in which "
                f"`python -m {module}` does the same"
            )
        sys.argv = [f"python -m {module}", *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
        sys.path.remove(str(lab_folder()))


def lab_folder() -> Path:
    """The folder in which `examples` and `benchmarks` lie: the checkout's root, or a part of the installed package."""
    above = Path(__file__).resolve().parents[1]
    return above / "lab" if (above / "lab").is_dir() else above


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True


def _refuse(arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"unknown arguments {' '.join(arguments)}: see --help")
