"""Writes the tables of ``docs/hosts.md`` and the README's list of hosts; ``--check`` says if both are up to date.

Every class of transformers' image-text-to-text mapping is built small, found out as ``attach_vision_remember`` does it,
and put through the checks of ``tests/zoo_checks.py``. That takes some minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.zoo import CLASSES, NEEDS_TIMM, REFUSED, REFUSED_WHEN_TRIED, SUPPORTED, WITH_TIMM, build_host, outline
from tests.zoo_checks import CHECKS, Subject, subject
from vision_remember.adapters.hosts import HOSTS
from vision_remember.adapters.resolve import resolve

PAGE = Path(__file__).with_name("hosts.md")
README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- Written by docs/make_host_table.py; do not edit by hand. -->"
END = "<!-- End of what docs/make_host_table.py writes. -->"
CONDITIONS = dict.fromkeys(
    ("minicpmv4_6", "minicpmv4_7"),
    "with `downsample_mode='4x'`; by default its encoder merges cells between blocks, which is refused",
)
"""What a host's configuration has to say where its default is refused."""


def tokens(host: Subject) -> str:
    """What an image token of a host stands for."""
    geometry = host.parts.spec.geometry
    if not host.parts.spec.plain:
        return "read off its packing in each call"
    if geometry is None or geometry.cells == (1, 1):
        return "one cell"
    if geometry.cells is None:
        return "the whole tile: `interaction='global'`"
    return "{}x{} cells".format(*geometry.cells)


def failed_checks(host: Subject) -> list[str]:
    """The names of the checks that a host does not pass."""
    failed = []
    for name, check in CHECKS.items():
        try:
            check(host)
        except Exception:  # whatever it is, it is no pass
            failed.append(name)
    return failed


def supported_row(model_type: str) -> list[str]:
    """The row of a host that Vision Remember attaches to."""
    host = subject(model_type)
    handle = host.attach()
    saliency = handle.config.saliency
    handle.detach()
    failed = failed_checks(host)
    passed = f"all but {', '.join(failed)}" if failed else "all"
    return [
        f"`{CLASSES[model_type]}`",
        f"`{model_type}`",
        "table" if model_type in HOSTS else "found out",
        f"`{type(host.parts.encoder).__name__}`",
        host.parts.encoder_spec.order,
        tokens(host),
        f"`{saliency}`" if saliency else "none",
        f"`{type(host.parts.decoder).__name__}`",
        f"{passed}, {CONDITIONS[model_type]}" if model_type in CONDITIONS else passed,
    ]


def refused_row(model_type: str) -> list[str]:
    """The row of a host that cannot be attached to: the error of attaching."""
    model = (build_host if model_type in REFUSED_WHEN_TRIED else outline)(model_type)
    try:
        resolve(model)
    except ValueError as error:
        return [f"`{CLASSES[model_type]}`", f"`{model_type}`", reason(str(error))]
    raise ValueError(f"{model_type} is in REFUSED of tests/zoo.py, but is not refused")


def reason(message: str) -> str:
    """An error without its advice and without all but the first of what was tried."""
    said, _, tried = message.partition("\nTried:\n")
    said = said.partition(" Describe it with a spec")[0].partition(": describe it with")[0].rstrip(".")
    first = tried.strip().split("\n")[0]
    return f"{said}; tried {first}" if first else said


def tables(progress: Callable[[str], None] = lambda model_type: None) -> str:
    """What stands between the markers.

    Args:
        progress: is told each host before it is built.
    """

    def rows(model_types: Sequence[str], row: Callable[[str], list[str]]) -> list[list[str]]:
        made = []
        for model_type in model_types:
            progress(model_type)
            made.append(row(model_type))
        return made

    supported = rows(SUPPORTED, supported_row)
    refused = rows(list(REFUSED), refused_row)
    columns = ["class", "model type", "spec", "encoder", "cell order", "a token is", "saliency", "decoder", "checks"]
    tried = ", ".join(f"`{CLASSES[name]}`" for name in WITH_TIMM)
    untried = ", ".join(f"`{CLASSES[name]}`" for name in NEEDS_TIMM if name not in WITH_TIMM)
    return "\n\n".join(
        [
            f"Made with {versions()}. Of {len(CLASSES)} model types ({len(set(CLASSES.values()))} classes) "
            f"{len(supported)} are supported, {len(refused)} are not; {len(NEEDS_TIMM)} need timm: {tried} are "
            f"supported and tried apart, {untried} is not tried.",
            "## Supported",
            markdown(columns, supported),
            "## Not supported",
            markdown(["class", "model type", "what attaching says"], refused),
        ]
    )


def readme_list() -> str:
    """All hosts that are supported, by their model types."""
    names = ", ".join(f"`{name}`" for name in sorted([*SUPPORTED, *WITH_TIMM]))
    return f"**The {len(SUPPORTED) + len(WITH_TIMM)} hosts**, by `config.model_type`: {names}."


def versions() -> str:
    """Of what the page depends on."""
    return f"torch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def updated(page: str, content: str) -> str:
    """The page with other tables.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r} in this order, once each")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None, *, page: Path = PAGE) -> int:
    """Writes the page, or with ``--check`` returns 1 if it is out of date."""
    parser = argparse.ArgumentParser(description="Writes the tables of docs/hosts.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    check = parser.parse_args(arguments).check
    transformers.logging.set_verbosity_error()
    text = page.read_text(encoding="utf-8")
    wanted = updated(text, tables(lambda model_type: print(model_type, file=sys.stderr)))
    readme = README.read_text(encoding="utf-8")
    stale = [(page, wanted)] if text != wanted else []
    if (listed := updated(readme, readme_list())) != readme:
        stale.append((README, listed))
    for path, content in stale:
        if check:
            print(f"{path.name} is out of date: run python docs/{Path(__file__).name}", file=sys.stderr)
        else:
            path.write_text(content, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
