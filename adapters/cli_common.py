"""What the sub-commands share: errors without a traceback, options of the same meaning, models by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from vision_remember.registry import did_you_mean


@dataclass(frozen=True)
class Choices:
    """What to attach, as the options of a command say.

    Attributes:
        adapter: folder or repository of a trained one; None for fresh blocks by what follows.
        layers: decoder layers.
        levels: encoder levels; None for the paper's, scaled.
        preset: of the configuration.
        overrides: fields of the configuration.
        projector: to swap first; None to keep the model's.
        ratio: cells per token of that projector.
    """

    adapter: str | None
    layers: list[int] | None
    levels: list[int] | None
    preset: str
    overrides: dict[str, Any]
    projector: str | None
    ratio: int

    @classmethod
    def of(
        cls,
        adapter: str | None,
        layers: str | None,
        levels: str | None,
        preset: str | None,
        assignments: list[str] | None,
        projector: str | None,
        ratio: int | None,
    ) -> Choices:
        """The options as they were typed, read.

        Raises:
            ValueError: one that cannot be read, or fresh blocks and an adapter asked for together.
        """
        fresh = assignments or any(given is not None for given in (layers, levels, preset, projector, ratio))
        if adapter is not None and fresh:
            raise ValueError(
                "--adapter brings its own configuration: leave out --layers, --levels, --preset, --set, --projector and"
                " --ratio"
            )
        if ratio is not None and projector is None:
            raise ValueError(f"--ratio {ratio} without --projector: name the projector to swap in")
        return cls(
            adapter,
            numbers(layers, "--layers"),
            numbers(levels, "--levels"),
            preset or "default",
            overrides(assignments),
            projector,
            _RATIO if ratio is None else ratio,
        )


_RATIO = 4  # cells per token, if nothing is said

P = ParamSpec("P")
R = TypeVar("R")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Repository id of the Hugging Face hub, or a folder.")]
Layers = Annotated[
    str | None, typer.Option(help="Decoder layers before which a block runs, counted from 0; 1,4 if not given.")
]
Levels = Annotated[
    str | None,
    typer.Option(help="Encoder levels (hidden_states indices); the paper's 13, 18, 23 of 24, scaled, if not given."),
]
Preset = Annotated[
    str | None,
    typer.Option(help='"default", which starts as an identity, or "paper", as printed; "default" if not given.'),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="A field of VisionRememberConfig, with a value as in JSON; repeatable.",
    ),
]
ProjectorName = Annotated[
    str | None, typer.Option("--projector", help="Swap the projector for this one first (see docs/projectors.md).")
]
Ratio = Annotated[int | None, typer.Option(min=1, help=f"Cells per token of --projector; {_RATIO} if not given.")]
Adapter = Annotated[
    str | None, typer.Option("--adapter", metavar="FOLDER|REPO", help="A trained adapter, instead of fresh blocks.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL on the hub.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto (as it was saved), float32, bfloat16 or float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write machine-readable JSON to stdout.")]


def helpful(command: Callable[P, R]) -> Callable[P, R]:
    """Turns what a user can mend into a message on stderr and exit code 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            if os.environ.get("VISION_REMEMBER_TRACEBACK"):
                raise
            typer.secho(f"Error: {error}", err=True, fg="red")
            raise typer.Exit(2) from error

    return run


def say(message: str) -> None:
    """One line of progress; stdout is for results."""
    typer.secho(message, err=True, dim=True)


def write_json(data: Any) -> None:
    """Results as JSON on stdout."""
    typer.echo(json.dumps(data, indent=2))


def numbers(text: str | None, name: str) -> list[int] | None:
    """``1,4`` -> [1, 4].

    Raises:
        ValueError: something else.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} {text!r}: expected whole numbers with commas between, such as 1,4") from None


def grid(text: str | None, name: str) -> tuple[int, int] | None:
    """``12x14`` -> (12, 14), rows first.

    Raises:
        ValueError: something else.
    """
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"{name} {text!r}: expected rows x columns, such as 12x12")
    return int(sides[0]), int(sides[1])


def overrides(assignments: list[str] | None) -> dict[str, Any]:
    """``["window=2", "saliency=null"]`` -> {"window": 2, "saliency": None}; values are JSON, or plain words.

    Raises:
        ValueError: no ``=`` in one, no such field, or one that has an option of its own.
    """
    from vision_remember.config import VisionRememberConfig

    known = [field.name for field in dataclasses.fields(VisionRememberConfig)]
    chosen = {}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r}: expected FIELD=VALUE, such as window=2 or saliency=null")
        if name in ("layers", "levels", "preset"):
            raise ValueError(f"--set {name}: expected --{name}, which is an option of its own")
        if name not in known:
            raise ValueError(f"--set {name}: VisionRememberConfig has no such field; {did_you_mean(name, known)}")
        try:
            chosen[name] = json.loads(value)
        except ValueError:
            chosen[name] = value
    return chosen


def table(rows: dict[str, str]) -> str:
    """Names and values in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def is_adapter(name: str) -> bool:
    """Whether ``name`` is a folder of an adapter."""
    return (Path(name) / "adapter_config.json").is_file()
