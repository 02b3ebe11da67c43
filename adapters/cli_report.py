"""`vision-remember report`: one picture, one question, one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vision_remember.adapters.cli_common import (
    Adapter,
    AsJson,
    Choices,
    Device,
    Dtype,
    Layers,
    Levels,
    Model,
    Preset,
    ProjectorName,
    Ratio,
    Revision,
    Set,
    helpful,
    numbers,
    say,
    write_json,
)
from vision_remember.adapters.cli_lab import need


@helpful
def report_command(
    model: Model,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file.")],
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask about it.")] = "What is in this image?",
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("report.html"),
    token: Annotated[
        str | None,
        typer.Option(metavar="ROW,COLUMN", help="The vision token to follow; the most salient one if not given."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 64,
    adapter: Adapter = None,
    layers: Layers = None,
    levels: Levels = None,
    preset: Preset = None,
    assignments: Set = None,
    projector: ProjectorName = None,
    ratio: Ratio = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model about a picture, and write what happens inside as one HTML file.

    The page shows the answer with and without Vision Remember, what is attached where, what the encoder finds salient,
    which cells a token re-reads, and how much attention image and text get in each layer. Fused attention stays on.
    Without --adapter the blocks are fresh: they change nothing, and the page shows what they have to work with.

    Examples:

        vision-remember report llava-hf/llava-1.5-7b-hf receipt.png -q "What is the total?" --adapter ./my-adapter

        vision-remember report ./my-model page.png --token 3,7 --out page.html

        vision-remember report ./my-model page.png --json > numbers.json

    Needs `pip install 'vision-remember[demo]'`.
    """
    chosen = None if token is None else numbers(token, "--token")
    if chosen is not None and len(chosen) != 2:
        raise ValueError(f"--token {token!r}: expected a row and a column, such as 3,7")
    choices = Choices.of(adapter, layers, levels, preset, assignments, projector, ratio)
    need("demo", "jinja2", "matplotlib", "numpy")
    if out.is_dir():
        raise ValueError(f"--out {out}: expected the name of a file, and this is a folder")

    from vision_remember.adapters.cli_load import attach, load_model, load_picture, load_processor
    from vision_remember.adapters.report import write_report

    picture = load_picture(image)
    processor = load_processor(model, revision)
    loaded = load_model(model, revision, device=device, dtype=dtype, adapter_follows=adapter is not None)
    attach(loaded, processor, choices)
    say(f"asking: {question}")
    report = write_report(
        loaded,
        processor,
        picture,
        question,
        out,
        token=None if chosen is None else (chosen[0], chosen[1]),
        max_new_tokens=max_new_tokens,
    )
    if as_json:
        write_json({**report.to_dict(), "page": str(out)})
    else:
        typer.echo(f"with Vision Remember: {report.answer}")
        typer.echo(f"without:              {report.plain_answer}")
        typer.echo(f"report: {out}")
