"""``python -m benchmarks.proof.report``: writes docs/proof.md and its figures from the lines of a results file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .figures import curves_figure, density_figure, forgetting_figure, pareto_figure
from .levels import CPU, GPU, LEVELS, LONG, Level
from .longer import longer_rows
from .results import ROOT, Results
from .tables import (
    claim_rows,
    interaction_rows,
    pruned_rows,
    recovery_rows,
    search_rows,
    stage_rows,
    suite_table,
    task_rows,
    tuning_rows,
)

BEGIN, END = "<!-- Written by benchmarks/proof/report.py; do not edit by hand. -->", "<!-- End of the written part. -->"
WIDER_SUITES = ("table5a", "causes")
"""What the level of the paper's geometry is run for."""
TITLES = {
    "table2": "Table 2: projectors, without and with Vision Remember",
    "table4a": "Table 4a: components",
    "table4b": "Table 4b: interactions, each with the default's saliency and its own learning rate",
    "table4c": "Table 4c: where the blocks stand",
    "table5a": "Table 5a: against no compression, at three ratios",
    "controls": "Controls: as many parameters, as much compute",
    "causes": "Causes: the map or its mean, SELA or its start",
    "search": "Search for a better default: chosen on other tasks and a seed of its own, then run as all others",
    "rivals": "Rivals: features added in place of attention, and tokens pruned without training",
}


def where_from(results: Results) -> str:
    """Where the lines of a level come from."""
    versions = [", ".join(f"{name} {version}" for name, version in line["versions"].items()) for line in results.lines]
    said = "; or ".join(dict.fromkeys(versions))
    return f"Level `{results.level.name}`, seeds {results.seeds}, {len(results.lines)} lines; {said}."


def before_the_arms(results: Results) -> list[str]:
    """What a level's encoder and decoders had learned before its arms began."""
    written = f"{100 * results.stages['encoder']['written_cells']:.1f} %"
    return [
        f"In the last steps of its training the encoder named {written} of the written cells. The decoders answered "
        "from symbols:",
        "\n".join(stage_rows(results)),
    ]


def wider_part(wider: Results) -> list[str]:
    """The level of the paper's geometry, with the tables of its own suites."""
    suites = [suite_table(wider, suite) for suite in WIDER_SUITES]
    tables = [claim_rows(wider), recovery_rows(wider), task_rows(wider), *suites, pruned_rows(wider)]
    return [
        "## At the paper's geometry",
        where_from(wider),
        *before_the_arms(wider),
        # a table without rows is what no arm has ended for yet
        *("\n".join(rows) for rows in tables if len(rows) > 2),
    ]


def written_part(results: Results, longer: Results | None = None, wider: Results | None = None) -> str:
    """Everything between the markers of the page.

    Args:
        results: What the tables show.
        longer: The same level with more steps, if it was run.
        wider: The level of the paper's geometry, if it was run.
    """
    parts = [
        where_from(results),
        *before_the_arms(results),
        "## What became of the paper's claims",
        "\n".join(claim_rows(results)),
        "## How much of the loss comes back",
        "\n".join(recovery_rows(results)),
        "## By task",
        "\n".join(task_rows(results)),
    ]
    for suite, title in TITLES.items():
        parts += [f"## {title}", "\n".join(suite_table(results, suite))]
        if suite == "search":
            parts += ["\n".join(search_rows(results)), "Validation accuracy of interactions with other saliencies:",
                      "\n".join(interaction_rows(results))]  # fmt: skip
        if suite == "rivals":
            parts += ["\n".join(pruned_rows(results))]
        if suite == "table4b":
            parts += ["Validation accuracy, by which rates were chosen:", "\n".join(tuning_rows(results))]
    if longer is not None:
        few = Results(results.path, results.level)
        few.keep_seeds_of(longer)
        parts += [f"## With {longer.level.arm.steps} steps", where_from(longer), "\n".join(longer_rows(few, longer))]
        parts += ["\n".join(task_rows(longer))]
    if wider is not None:
        parts += wider_part(wider)
    return "\n\n".join(parts)


def updated(page: str, part: str) -> str:
    """The page with its written part replaced.

    Raises:
        ValueError: a page without the two markers.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r} once each")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    return f"{head}{BEGIN}\n\n{part}\n\n{END}{tail}"


def _beside(results: Results, level: Level) -> Results | None:
    """What another level has run, whose file stands beside that of the level cpu."""
    file = results.path.with_name(f"proof_{level.name}.jsonl")
    return Results(file, level) if results.level == CPU and file.exists() else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof.report", description=__doc__)
    parser.add_argument("--level", choices=list(LEVELS), default="cpu")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/proof_LEVEL.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "proof.md")
    options = parser.parse_args(arguments)
    path = options.results or ROOT / "benchmarks" / "results" / f"proof_{options.level}.jsonl"
    results = Results(path, LEVELS[options.level])
    wider = _beside(results, GPU)
    part = written_part(results, _beside(results, LONG), wider)
    options.page.write_text(updated(options.page.read_text(encoding="utf-8"), part), encoding="utf-8")
    images = options.page.parent / "images"
    images.mkdir(exist_ok=True)
    figures = {
        "proof_pareto": pareto_figure(results),
        "proof_curves": curves_figure(results),
        "proof_density": density_figure(results),
        "proof_forgetting": forgetting_figure(results),
    }
    if wider is not None:
        figures |= {"proof_gpu_density": density_figure(wider), "proof_gpu_forgetting": forgetting_figure(wider)}
    for name, figure in figures.items():
        figure.savefig(images / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
