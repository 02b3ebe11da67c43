"""The command `vision-remember`: what its sub-commands are called, and how errors reach the user.

Nothing heavy is imported before a sub-command runs; each lives in a module `cli_*` of this folder.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vision_remember.adapters.cli_export import export_command
from vision_remember.adapters.cli_inspect import inspect_command
from vision_remember.adapters.cli_lab import bench_command, demo_command, eval_command, train_command
from vision_remember.adapters.cli_report import report_command
from vision_remember.adapters.cli_serve import serve_command

app = typer.Typer(
    name="vision-remember",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
"""For commands whose arguments are those of what they start."""

app.command("inspect")(inspect_command)
app.command("report")(report_command)
app.command("export")(export_command)
app.command("serve", context_settings=_PASSED_ON)(serve_command)
app.command("demo", context_settings=_PASSED_ON)(demo_command)
app.command("train", context_settings=_PASSED_ON)(train_command)
app.command("bench", context_settings=_PASSED_ON)(bench_command)
app.command("eval", context_settings=_PASSED_ON)(eval_command)


def _version(wanted: bool) -> None:
    if wanted:
        import vision_remember

        typer.echo(f"vision-remember {vision_remember.__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Vision Remember: vision tokens of a multimodal model re-read the image between its decoder layers.

    Look at a model first, then measure, train and share:

        vision-remember inspect llava-hf/llava-1.5-7b-hf    # loads no weights

        vision-remember report MODEL picture.png --out report.html

        vision-remember demo                                # some minutes on a CPU

    MODEL is a repository id of the Hugging Face hub or a folder. A folder with a `config.json` and no weights does too:
    such a model has random weights.

    Wrong arguments end with exit code 2 and a line on what was expected; `VISION_REMEMBER_TRACEBACK=1` shows all of it.
    """


def main() -> None:
    """The console script."""
    app()
