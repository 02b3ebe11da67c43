"""Every command that README, docs, help pages and scripts show is read by the program's own parser, and not run."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import typer
from accelerate.commands.launch import launch_command_parser
from transformers.cli.serve import Serve
from trl import TrlParser
from typer.testing import CliRunner

from vision_remember.adapters import cli_lab, serve
from vision_remember.adapters.cli import app
from vision_remember.adapters.cli_common import Choices

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [path for folder in ("examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROGRAMS = r"(?:make|python|pip|pytest|vision-remember|accelerate|torchrun|lmms-eval|curl|\.venv/bin/\S+|\.ci/run)"

NOT_READ = {
    "lmms-eval": "not installed beside the others; tests/evaluation runs the command with our model",
    "curl": "a program of the system; the server's tests ask it in Python",
}
# Modules without a parser, and their table of what may be named; None for those that take nothing.
NO_PARSER = {
    "examples.custom_mllm": None,
    "examples.llava_vr": None,
    "tests.run_versions": "ROWS",
    "tests.upstream.run": "HOSTS",
}


class ReachedError(Exception):
    """A parser took its arguments; what would run now is not run."""


class RefusedError(Exception):
    """A parser did not take its arguments, or what a command names is not there."""


# ---- what the pages show


def joined(text: str) -> Iterator[str]:
    """The commands of some lines: continued ones in one piece, prompts and empty lines taken off."""
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        command = line.strip().removeprefix("$ ")
        if command and not command.startswith("#"):
            yield command


def commands_of(page: str) -> list[str]:
    """The commands of a page: of its shell blocks, of indented lines, and between back-quotes."""
    found: list[str] = []
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for kind, block in blocks:
        if kind in ("bash", "sh", "shell", "console"):
            found += joined(block)
    # What a page has its reader write, tests/test_extending_page.py runs.
    own = {f"python {file}" for file in re.findall(r"^# file: (\S+)$", page, re.MULTILINE)}
    found = [command for command in found if command not in own]
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    found += joined("\n".join(re.findall(rf"^    {PROGRAMS} .*", prose, re.MULTILINE)))
    spans = (" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose))
    # In prose, a program and its sub-command are a name: `vision-remember inspect`.
    named = r"(?:vision-remember|accelerate) \w+"
    return found + [f"{s} --help" if re.fullmatch(named, s) else s for s in spans if re.match(rf"{PROGRAMS} \S", s)]


def shown() -> dict[str, list[str]]:
    """All commands, by the page or script that shows them."""
    found = {path.relative_to(ROOT).as_posix(): commands_of(path.read_text(encoding="utf-8")) for path in PAGES}
    for path in SCRIPTS:
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.relative_to(ROOT).as_posix()] = commands_of(about)
    for command in app.registered_commands:
        assert command.callback is not None
        found[f"vision-remember {command.name} --help"] = commands_of(inspect.getdoc(command.callback) or "")
    found["vision-remember --help"] = commands_of(inspect.getdoc(about) or "")
    return found


SHOWN = [(page, command) for page, commands in shown().items() for command in commands]


# ---- the parsers


def exists(name: str) -> None:
    if not (ROOT / name).exists():
        raise RefusedError(f"no file {name}")


def read_make(arguments: list[str]) -> None:
    for word in arguments:
        if word not in TARGETS and not re.fullmatch(r"[A-Z_]+=\S*", word):
            raise RefusedError(f"no target {word} in the Makefile")


def read_pip(arguments: list[str]) -> None:
    """The few flags that pages use; extras and files must exist."""
    parser = argparse.ArgumentParser(prog="pip", allow_abbrev=False)
    parser.add_argument("command", choices=["install"])
    parser.add_argument("packages", nargs="*")
    parser.add_argument("--no-deps", action="store_true")
    parser.add_argument("--target")
    parser.add_argument("--requirement")
    parser.add_argument("--constraint")
    given = parser.parse_args(arguments)
    for file in (given.requirement, given.constraint):
        if file:
            exists(file)
    for package in given.packages:
        name, extras = re.fullmatch(r"([^\[\]]+)(?:\[(.*)\])?", package).groups()  # type: ignore[union-attr]
        if name not in (".", "vision-remember"):
            raise RefusedError(f"{name}: not this project")
        for extra in extras.split(",") if extras else []:
            if extra not in EXTRAS:
                raise RefusedError(f"no extra {extra} in pyproject.toml")


def read_pytest(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="pytest", allow_abbrev=False)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("-k")
    parser.add_argument("-q", action="store_true")
    for path in parser.parse_args(arguments).paths:
        exists(path)


def read_script(run: Callable[[], Any], arguments: list[str]) -> None:
    """Starts a script and stops it when its parser has taken the arguments."""
    plain, with_config = argparse.ArgumentParser.parse_args, TrlParser.parse_args_and_config

    def stop(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*given: Any, **options: Any) -> Any:
            taken = read(*given, **options)
            if options.get("return_remaining_strings") and taken[-1]:
                raise RefusedError(f"arguments that no one knows: {taken[-1]}")  # the script says so behind this point
            raise ReachedError

        return reading

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["script", *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop(plain))
        patch.setattr(TrlParser, "parse_args_and_config", stop(with_config))
        patch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # files for GPUs
        try:
            run()
        except ReachedError:
            return
    raise RefusedError("the script ran to its end and read no arguments")


def read_module(arguments: list[str]) -> None:
    """What follows ``python -m``."""
    module, *rest = arguments
    if module == "pytest":
        return read_pytest(rest)
    try:
        there = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise RefusedError(f"no module {module}")
    if module not in NO_PARSER:
        return read_script(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), rest)
    table = NO_PARSER[module]
    taken = getattr(importlib.import_module(module), table) if table else ()
    if not set(rest) <= set(taken):
        raise RefusedError(f"{module} takes {', '.join(taken) or 'no arguments'}, not {rest}")
    return None


def read_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        return read_module(arguments[1:])
    exists(arguments[0])
    return read_script(lambda: runpy.run_path(str(ROOT / arguments[0]), run_name="__main__"), arguments[1:])


def read_launcher(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """accelerate's and torch's launchers, and what they launch."""
    given = parser.parse_args(arguments)
    if getattr(given, "config_file", None):
        exists(given.config_file)
    read_python([*(["-m"] if given.module else []), given.training_script, *given.training_script_args])


def read_ours(arguments: list[str]) -> None:
    """``vision-remember``; what it starts reads its own part."""
    group = typer.main.get_command(app)
    if arguments in (["--help"], ["--version"]):
        return
    name, command, rest = group.resolve_command(group.make_context("vision-remember", [*arguments]), [*arguments])  # type: ignore[attr-defined]
    assert name is not None
    started: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_lab, "need", lambda *_: None)
        patch.setattr(cli_lab, "start", lambda module, given: started.append([module, *given]))
        patch.setattr(serve, "serve", lambda model, _, given: started.append(["serve", model, *given]))
        if command.name in ("inspect", "report", "export"):
            given = command.make_context(name, list(rest)).params
            order = ("adapter", "layers", "levels", "preset", "assignments", "projector", "ratio")
            Choices.of(*(given[option] for option in order))
            return
        done = CliRunner().invoke(app, arguments)
    if done.exit_code:
        raise RefusedError(done.output)
    if not started:  # its own help
        assert "--help" in arguments, arguments
    elif started[0][0] == "serve":
        theirs = typer.Typer()
        theirs.command()(Serve)
        typer.main.get_command(theirs).make_context("transformers serve", started[0][1:])
    else:
        read_module(started[0])
    return


READERS: dict[str, Callable[[list[str]], None]] = {
    "make": read_make,
    "pip": read_pip,
    "pytest": read_pytest,
    "python": read_python,
    ".venv/bin/python": read_python,
    "vision-remember": read_ours,
    "accelerate": lambda words: read_launcher(launch_command_parser(), words[1:] if words[0] == "launch" else words),
    "torchrun": lambda words: read_launcher(torch.distributed.run.get_args_parser(), words),
}


def read(command: str) -> None:
    """Has a command read by the parser of its program.

    Raises:
        RefusedError: it would not be taken, or nothing here can read it.
    """
    command = re.sub(r" \[(-[^\]]*)\]", r" \1", command)  # [--seeds 2]
    words = ["--help" if word == "..." else word for word in shlex.split(command, comments=True)]
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if ">" in words:
        words = words[: words.index(">")]
    program, *arguments = words
    if program in NOT_READ:
        return
    if program not in READERS:
        if not (ROOT / program).is_file() or arguments:
            raise RefusedError(f"nothing reads {program}")
        return
    try:
        READERS[program](arguments)
    except SystemExit as stop:
        if stop.code:
            raise RefusedError(f"exit code {stop.code}") from stop
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error
    except Exception as error:  # typer keeps the classes of its errors to itself
        if not hasattr(error, "exit_code"):
            raise
        if error.exit_code:
            raise RefusedError(str(error)) from error


# ---- the tests


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{page}: {command}" for page, command in SHOWN])
def test_a_command_that_is_shown_is_taken(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        read(command)
    except RefusedError as error:
        raise AssertionError(f"{page} shows `{command}`: {error}") from error


def test_commands_are_found_in_blocks_in_lines_and_in_prose() -> None:
    block = "```bash\n# why\nA=1 a \\\n  b\n```\n\n```python\nx = `make no`\n```\n"
    page = f"Run `make\nx` and `make`.\n\n{block}\n    python -m c  # d\n"
    assert commands_of(page) == ["A=1 a b", "python -m c  # d", "make x"]
    assert len(SHOWN) > 60


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    "command",
    [
        "make tset",
        "pip install '.[trian]'",
        "pip install --no-dep .",
        "pip install --requirement nowhere.txt",
        "python -m examples.nowhere",
        "python -m examples.demo --sedes 2",
        "python -m examples.train --backend lop",
        "python -m examples.train --backend loop --config examples/configs/tiny.yaml --output_dir run --made_up 1",
        "python -m examples.train --backend loop --config examples/configs/nowhere.yaml --output_dir run",
        "python -m examples.llava_vr --made-up",
        "python -m benchmarks.speed --suite ops",
        "python -m benchmarks.evaluation --pretrained base/ --made-up",
        "python -m tests.run_versions oldset",
        "python docs/make_nothing.py",
        "python docs/make_host_table.py --made-up",
        "python -m pytest tests/test_nowhere.py",
        "python -m pytest --made-up",
        "accelerate launch --made-up 8 -m examples.demo",
        "accelerate launch --config_file nowhere.yaml -m examples.demo",
        "accelerate launch -m examples.demo --made-up",
        "torchrun --made-up 2 -m examples.demo",
        "torchrun --nproc-per-node 2 -m examples.demo --made-up",
        "vision-remember inspcet my-model",
        "vision-remember inspect my-model --made-up",
        "vision-remember inspect my-model --layers 1;4",
        "vision-remember report my-model",
        "vision-remember serve my-model --made-up",
        "vision-remember demo --made-up",
        "vision-remember train --backend loop --made-up",
        "vision-remember bench sped",
        "vision-remember bench speed --made-up",
        "vision-remember eval --made-up",
        "rm -r build",
    ],
)  # fmt: skip
def test_a_command_that_would_fail_is_refused(command: str) -> None:
    with pytest.raises(RefusedError):
        read(command)
