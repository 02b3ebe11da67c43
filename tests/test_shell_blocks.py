"""Every shell line of README and docs is one that its program accepts: real parsers read it, nothing is run.

The lines of docs/command_line.md and docs/extending.md are run as well, in tests of their own.
"""

from __future__ import annotations

import argparse
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from accelerate.commands.launch import launch_command_parser
from typer.main import get_command

from tests.test_packaging import PYPROJECT
from vision_remember.adapters.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("make", "python", "pip", "vision-remember", "accelerate", "lmms-eval")
# Not installed beside transformers 5.23's own tests: the folder tests/evaluation runs it in an environment of its own.
NOT_HERE = ("lmms-eval",)


class ParsedError(Exception):
    """A program's parser took the whole line."""


def lines_of(text: str) -> list[str]:
    """The command lines of a page: those of its shell blocks, and indented ones that begin with a program."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash|console|sh|shell)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(rf"^ {{4}}((?:{'|'.join(PROGRAMS)}) .*)$", text, re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if shlex.split(line, comments=True)] + indented


LINES = [
    pytest.param(line, id=f"{page.name}: {line[:60]}") for page in PAGES for line in lines_of(page.read_text("utf-8"))
]


def check(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises AssertionError, ValueError or SystemExit unless the line's program accepts it."""
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), f"the Makefile has no {rest}"
    elif program == "pip":
        check_installation(rest)
    elif program == "vision-remember":
        command: Any = get_command(app)
        assert rest[0] in command.commands, f"no command {rest[0]!r}"
        try:
            command.commands[rest[0]].make_context(rest[0], rest[1:])
        except Exception as error:  # typer keeps the classes of its errors to itself
            raise AssertionError(str(error)) from error
    elif program == "accelerate":
        assert rest[0] == "launch"
        known = launch_command_parser().parse_args(rest[1:])
        assert known.config_file is None or (ROOT / known.config_file).is_file()
        assert known.module, "expected -m and a module"
        check_program(known.training_script, known.training_script_args, monkeypatch)
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        for path in (word for word in rest[2:] if "/" in word):
            assert (ROOT / path).exists(), f"no {path}"
    elif program == "python" and rest[0] == "-m":
        check_program(rest[1], rest[2:], monkeypatch)
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), f"no {rest[0]}"
        check_program(str(ROOT / rest[0]), rest[1:], monkeypatch)
    else:
        assert program in NOT_HERE, f"no rule for {program!r}: add one, or a reason why there is none"


def check_installation(words: list[str]) -> None:
    """Extras and files that an installation names exist."""
    assert words[0] == "install"
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])
    for option, file in itertools.pairwise(words):
        assert option not in ("-r", "--requirement") or (ROOT / file).is_file()


def check_program(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A module, or a file, whose parser takes all arguments."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop_when_all_is_read(self: argparse.ArgumentParser, *given: Any, **named: Any) -> Any:
        found, rest = parse(self, *given, **named)
        if rest:  # for a parser further inside
            return found, rest
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop_when_all_is_read)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    except ParsedError:
        return
    except SystemExit as error:
        if error.code == 0 and "--help" in arguments:
            return
        raise
    raise AssertionError(f"{program} never read its arguments")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("line", LINES)
def test_the_program_accepts_the_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(line, monkeypatch)


def test_pages_have_lines() -> None:
    assert len(LINES) >= 30


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    "line",
    [
        "make nothing-of-the-kind",
        'pip install "vision-remember[nothing]"',
        "pip install --requirement nowhere.txt",
        "vision-remember inspect my-model --no-such-flag",
        "vision-remember nothing",
        "python -m benchmarks.speed --suite nothing",
        "python -m benchmarks.proof --no-such-flag",
        "python -m examples.train --backend loop --config examples/configs/tiny.yaml --output_dir run --no_such_flag 1",
        "python -m benchmarks.nothing",
        "python docs/nothing.py",
        "python -m pytest tests/nothing.py",
        "accelerate launch --config_file nowhere.yaml -m examples.train --backend loop",
        "accelerate launch --no-such-flag -m examples.train --backend loop",
        "rm -r build",
    ],
)
def test_a_line_that_no_program_accepts_fails(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    def leave(self: argparse.ArgumentParser, message: str) -> NoReturn:
        raise SystemExit(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", leave)
    with pytest.raises((AssertionError, SystemExit, ValueError, ImportError, RuntimeError)):
        check(line, monkeypatch)
