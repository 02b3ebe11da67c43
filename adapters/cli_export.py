"""`vision-remember export`: a block as a graph, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vision_remember.adapters.cli_common import (
    Adapter,
    AsJson,
    Choices,
    Layers,
    Levels,
    Model,
    Preset,
    ProjectorName,
    Ratio,
    Revision,
    Set,
    grid,
    helpful,
    say,
    write_json,
)

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


@helpful
def export_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files, one a block.")] = Path("export"),
    form: Annotated[str, typer.Option("--format", help="onnx, or torch for torch.export (.pt2).")] = "onnx",
    tokens: Annotated[
        str | None, typer.Option(metavar="ROWSxCOLUMNS", help="Token grid, where images have any size.")
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(metavar="ROWSxCOLUMNS", help="Grid of encoder cells, likewise."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference that passes the check.")] = 1e-3,
    adapter: Adapter = None,
    layers: Layers = None,
    levels: Levels = None,
    preset: Preset = None,
    assignments: Set = None,
    projector: ProjectorName = None,
    ratio: Ratio = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Write the blocks as ONNX or torch.export graphs, run them, and report how far they are from the originals.

    One file for each decoder layer with a block, for any number T of tiles, float32. Inputs: `tokens (T, h*w, D)`,
    `features (T, H*W, C)` and `saliency (T, H*W)`; output: `remembered (T, h*w, D)`. No weights of the model are
    loaded, and the language model around the blocks is not exported.

    Blocks without training are identities, of which equal outputs prove nothing: their graphs are checked once more
    with random weights. Exit code 1 if a difference is above --tolerance.

    Examples:

        vision-remember export llava-hf/llava-1.5-7b-hf --adapter ./my-adapter --out export/

        vision-remember export ./my-model --format torch --json

        vision-remember export ./qwen2-vl --tokens 12x16 --cells 24x32

    ONNX needs `pip install 'vision-remember[export]'`.
    """
    if form not in _SUFFIXES:
        raise ValueError(f"--format {form!r}: expected {' or '.join(_SUFFIXES)}")
    choices = Choices.of(adapter, layers, levels, preset, assignments, projector, ratio)
    grids = grid(tokens, "--tokens"), grid(cells, "--cells")

    from vision_remember.adapters.base_model import refuse_blocks
    from vision_remember.adapters.cli_load import attached_skeleton
    from vision_remember.adapters.export import export_block
    from vision_remember.adapters.resolve import resolve
    from vision_remember.adapters.weight_names import weight_names
    from vision_remember.remember import VisionRemember

    if adapter is None:
        refuse_blocks(model, weight_names(model, revision))
    _, handle = attached_skeleton(model, revision, choices)
    parts = resolve(handle.host, handle.spec)
    token_grid = grids[0] or handle.config.token_grid or parts.token_grid
    feature_grid = grids[1] or parts.feature_grid
    if token_grid is None or feature_grid is None:
        raise ValueError(f"images of {model} have grids of any size: say for which, with --tokens and --cells")
    results = []
    for layer, block in handle.module.items():
        say(f"exporting the block before layer {layer}")
        assert isinstance(block, VisionRemember)
        path = out / f"layer_{layer}{_SUFFIXES[form]}"
        found = export_block(block, path, token_grid=token_grid, feature_grid=feature_grid, form=form)  # type: ignore[arg-type]
        worst = max(found.difference, found.trial_difference or 0.0)
        results.append(
            {
                "layer": int(layer),
                "path": str(path),
                "format": form,
                "token_grid": token_grid,
                "feature_grid": feature_grid,
                "identity": found.magnitude == 0,
                "difference": found.difference,
                "difference_with_random_weights": found.trial_difference,
                "passed": worst <= tolerance,
            }
        )
        if not as_json:
            how = "" if found.trial_difference is None else " (untrained: measured with random weights)"
            typer.echo(f"{path}  largest difference {worst:.1e}{how}")
    if as_json:
        write_json({"model": model, "tolerance": tolerance, "blocks": results})
    if not all(result["passed"] for result in results):
        typer.secho(f"Error: a difference is above --tolerance {tolerance}", err=True, fg="red")
        raise typer.Exit(1)
