"""`vision-remember inspect`: what would be attached where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    helpful,
    table,
    write_json,
)

if TYPE_CHECKING:
    from vision_remember.adapters.handle import VisionRememberHandle


@helpful
def inspect_command(
    model: Model,
    layers: Layers = None,
    levels: Levels = None,
    preset: Preset = None,
    assignments: Set = None,
    projector: ProjectorName = None,
    ratio: Ratio = None,
    adapter: Adapter = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Show what would be attached where: host, encoder, levels, grids, tokens, parameters.

    Needs the model's configuration only. No weights are loaded: the language model is never built in memory, so a model
    of 70B is no problem on a laptop. What lies in front of it gets random weights; with hosts that are in no table a
    small image is run through it, to see which part of an image each token stands for.

    Examples:

        vision-remember inspect llava-hf/llava-1.5-7b-hf

        vision-remember inspect ./my-model --layers 1,4,7 --set window=2

        vision-remember inspect ./my-model --projector adaptive_avg_pool --ratio 4 --json

        vision-remember inspect ./my-model --adapter ./my-adapter

    Fields for --set are those of `VisionRememberConfig`: interaction, window, fusion, saliency, token_mixer ...
    """
    from vision_remember.adapters.cli_load import attached_skeleton

    choices = Choices.of(adapter, layers, levels, preset, assignments, projector, ratio)
    _, handle = attached_skeleton(model, revision, choices)
    if as_json:
        write_json(described(model, handle))
    else:
        typer.echo(table({"model": model, **handle.summary()}))


def described(name: str, handle: VisionRememberHandle) -> dict[str, Any]:
    """The numbers of a handle as plain data."""
    from vision_remember.adapters.resolve import resolve

    parts = resolve(handle.host, handle.spec)
    grid = handle.config.token_grid or parts.token_grid
    return {
        "model": name,
        "host": type(parts.model).__name__,
        "encoder": type(parts.encoder).__name__,
        "decoder_layers": len(parts.layers),
        "hidden_size": parts.hidden_size,
        "feature_grid": parts.feature_grid,
        "token_grid": grid,
        "parameters": handle.parameter_counts(),
        "config": handle.config.to_dict(),
    }
