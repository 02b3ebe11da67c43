"""`vision-remember serve`: transformers' own server, with Vision Remember in its models."""

from __future__ import annotations

from typing import Annotated

import typer

from vision_remember.adapters.cli_common import (
    Adapter,
    Choices,
    Layers,
    Levels,
    Model,
    Preset,
    ProjectorName,
    Ratio,
    Set,
    helpful,
    say,
)


@helpful
def serve_command(
    context: typer.Context,
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    adapter: Adapter = None,
    layers: Layers = None,
    levels: Levels = None,
    preset: Preset = None,
    assignments: Set = None,
    projector: ProjectorName = None,
    ratio: Ratio = None,
) -> None:
    """Serve a model with Vision Remember over HTTP, by the OpenAI protocol.

    It is `transformers serve` that serves: one model, loaded and attached before the first request. What is not listed
    here goes on to it, --device, --dtype or --enable-cors for instance (see `transformers serve --help`).

    Examples:

        vision-remember serve llava-hf/llava-1.5-7b-hf --adapter ./my-adapter --device cuda --dtype bfloat16

        curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"messages": [...]}'

    Needs `pip install 'vision-remember[serve]'`. Anyone who reaches the port can use the model, and have the server
    open any address or any picture on its disks as an `image_url`: leave --host as it is unless that is what you want.
    """
    choices = Choices.of(adapter, layers, levels, preset, assignments, projector, ratio)

    from vision_remember.adapters.serve import serve

    say(f"loading {model}, to serve it at http://{host}:{port}; Ctrl-C ends it")
    serve(model, choices, ["--host", host, "--port", str(port), *context.args])
