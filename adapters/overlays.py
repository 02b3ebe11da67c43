"""What Vision Remember sees in a host: saliency over images, the cells that tokens re-read, what they keep."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_remember.adapters.attachment import Attachment, find_attachment
from vision_remember.adapters.resolve import HostParts, resolve
from vision_remember.adapters.tokens import placeholders
from vision_remember.analysis import ForgettingCurve, RegionAttention, SaliencyMap, linear_probe, saliency_maps
from vision_remember.memory import VisionMemory

Target = Literal["position", "cell"]


@torch.no_grad()
def saliency_map(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[SaliencyMap, ...]:
    """What the vision encoder finds salient in each image of a batch (Vision Remember, eq. 3), as the blocks use it.

    Args:
        model: a model that Vision Remember is attached to.
        inputs: what the processor made of the images, prompts or not.

    Returns:
        One map for each image, in order.

    Raises:
        ValueError: inputs without images, or an attachment without saliency.
        RuntimeError: nothing is attached.
    """
    attachment = _attachment(model)
    return saliency_maps(_memories(resolve(model, attachment.spec), attachment, inputs))


@torch.no_grad()
def region_attention(model: nn.Module, inputs: Mapping[str, Any], layer: int) -> tuple[RegionAttention, ...]:
    """Where the vision tokens of a batch look in front of one decoder layer.

    Args:
        model: a model that Vision Remember is attached to.
        inputs: what the processor made of prompts and images; ``labels`` are not passed on.
        layer: the decoder layer, 0-based; one that has a block.

    Returns:
        One for each size of tiles, so usually one; its tiles are those of all images in order.

    Raises:
        ValueError: a layer without a block, an interaction without attention weights, blocks that are switched off, or
            inputs without images.
        RuntimeError: nothing is attached.
    """
    attachment = _switched_on(model)
    blocks = attachment.blocks()
    if layer not in blocks:
        raise ValueError(f"layer={layer}: blocks stand in front of layers {sorted(blocks)}")
    interaction: Any = blocks[layer].interaction
    if not hasattr(interaction, "attention_weights"):
        raise ValueError(
            f"interaction={attachment.config.interaction!r} has no attention weights over cells: "
            "attach 'sela' or 'global'"
        )
    found: list[RegionAttention] = []
    thread = threading.get_ident()

    def look(module: nn.Module, args: tuple[Tensor, Any], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != thread:  # the model may run elsewhere meanwhile, on other images
            return
        grids = {name: kwargs[name] for name in ("token_grid", "feature_grid")}
        weights = interaction.attention_weights(*args, **grids)
        found.append(RegionAttention(weights, **grids, window=getattr(interaction, "window", None)))

    hook = interaction.register_forward_pre_hook(look, with_kwargs=True)
    try:
        resolve(model, attachment.spec).base(**_without_labels(inputs))
    finally:
        hook.remove()
    if not found:
        raise ValueError(f"inputs has {sorted(inputs)}, and no image among them that a block could read")
    return tuple(found)


@torch.no_grad()
def forgetting_curve(
    model: nn.Module, inputs: Mapping[str, Any], *, target: Target | Tensor = "position", ridge: float = 1e-3
) -> ForgettingCurve:
    """What a linear probe reads off the vision tokens in front of each decoder layer, with and without the blocks.

    Probes are fitted on the first, third, ... image and scored on the others; nothing is random. The second of the two
    passes has the blocks switched off, in every thread. A curve that falls shows what the decoder no longer keeps in a
    linear form, which is not all that it knows.

    Args:
        model: a model that Vision Remember is attached to.
        inputs: what the processor made of prompts and images, two images or more; ``labels`` are not passed on.
        target: what the probe predicts of a token.

            - "position": row and column of its place in the tile, as fractions (R2).
            - "cell": which place of the tile's grid it has (accuracy); for images with tiles of one size.
            - (N,) whole numbers or (N, K) real numbers for the N vision tokens of the batch in order, separators left
              out: what lies there, say. The probe then tells what the token knows of the image.
        ridge: see :func:`vision_remember.analysis.linear_probe`.

    Raises:
        ValueError: fewer than two images, a target that does not fit, or blocks that are switched off.
        RuntimeError: nothing is attached.
    """
    attachment = _switched_on(model)
    parts = resolve(model, attachment.spec)
    inputs = _without_labels(inputs)
    memories = _memories(parts, attachment, inputs)
    places, cells, images = _tokens(memories)
    if len(memories[0].spans) < 2:
        raise ValueError("one image: expected two or more, to fit on some and to score on the others")
    if isinstance(target, Tensor):
        if len(target) != len(places):
            raise ValueError(f"target has {len(target)} rows, but the images have {len(places)} vision tokens")
        targets = target.cpu()
    elif target == "position":
        targets = places
    elif target == "cell":
        if len({memory.token_grid for memory in memories}) > 1:
            raise ValueError("target='cell': the images' tiles have several sizes; use target='position'")
        targets = cells
    else:
        raise ValueError(f"target={target!r}: expected 'position', 'cell' or a tensor")
    train = images % 2 == 0
    at = placeholders(parts.base, inputs, parts.image_token_id)
    held = torch.stack([_slots(memory) >= 0 for memory in memories]).any(0)
    curves = []
    for used in (nullcontext(), attachment.disabled()):
        with used:
            states = _vision_states(parts, inputs, at, held)
        curves.append(torch.tensor([linear_probe(state, targets, train, ridge=ridge) for state in states]))
    score = "r2" if targets.is_floating_point() else "accuracy"
    return ForgettingCurve(curves[0], curves[1], score, int(train.sum()), int((~train).sum()))


def _attachment(model: nn.Module) -> Attachment:
    attachment = find_attachment(model)
    if attachment is None:
        raise RuntimeError(
            f"no Vision Remember is attached to this {type(model).__name__}: attach_vision_remember(model) first, "
            "which changes no output"
        )
    return attachment


def _switched_on(model: nn.Module) -> Attachment:
    attachment = _attachment(model)
    if not attachment.enabled:
        raise ValueError("the blocks are switched off: ask outside of `with handle.disabled()`")
    return attachment


def _without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "labels"}


def _memories(parts: HostParts, attachment: Attachment, inputs: Mapping[str, Any]) -> tuple[VisionMemory, ...]:
    """What the blocks get of the images of a batch."""
    method: Callable[..., Any] = parts.base.get_image_features  # type: ignore[assignment]
    if inputs.get("pixel_values") is None:
        raise ValueError(f"inputs has {sorted(inputs)}: expected pixel_values among them")
    arguments = {name: inputs[name] for name in inspect.signature(method).parameters if name in inputs}
    return attachment.memories(**arguments)


def _slots(memory: VisionMemory) -> Tensor:
    """(R,), the memory's token that each image token is, -1 for none."""
    if memory.slots is not None:
        return memory.slots.cpu()
    return torch.arange(sum(len(span.rows) for span in memory.spans))


def _tokens(memories: tuple[VisionMemory, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """For the N vision tokens of all images: (N, 2) places as fractions, (N,) cells of the tile, (N,) images."""
    lengths = torch.tensor([len(span.rows) for span in memories[0].spans])
    images = torch.arange(len(lengths)).repeat_interleave(lengths)
    places, cells = torch.full((len(images), 2), torch.nan), torch.full_like(images, -1)
    for memory in memories:
        slots, (h, w) = _slots(memory), memory.token_grid
        inside, cell = slots >= 0, slots % memory.tile_tokens
        cells[inside] = cell[inside]
        places[inside] = torch.stack([(cell // w + 0.5) / h, (cell % w + 0.5) / w], -1)[inside]
    held = cells >= 0
    return places[held], cells[held], images[held]


def _vision_states(parts: HostParts, inputs: dict[str, Any], at: Tensor, held: Tensor) -> list[Tensor]:
    """(N, D) for each layer, what enters it at the vision tokens, and what leaves the last one."""
    states: list[Tensor] = []
    thread = threading.get_ident()

    def keep(hidden: Tensor) -> None:
        if threading.get_ident() == thread:  # the model may run elsewhere meanwhile, on other images
            states.append(hidden[at.to(hidden.device)].cpu()[held])

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(output if isinstance(output, Tensor) else output[0])

    # Behind the hooks of the blocks, so that their updates are in.
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in parts.layers]
    hooks.append(parts.layers[-1].register_forward_hook(after))
    try:
        parts.base(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return states
