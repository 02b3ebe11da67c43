"""Attach and detach: every check comes first, then the host is changed, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from vision_remember.adapters.attachment import NAME, Attachment, feature_dim, find_attachment
from vision_remember.adapters.devices import offloaded_placement
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.pruner_attachment import find_pruner
from vision_remember.adapters.resolve import HostParts, block_placement, resolve
from vision_remember.adapters.sharding import is_sharded
from vision_remember.adapters.spec import MLLMSpec
from vision_remember.adapters.versions import warn_outside_the_windows
from vision_remember.config import VisionRememberConfig
from vision_remember.encoder import find_module, scale_levels
from vision_remember.interactions import INTERACTIONS, interaction_options
from vision_remember.remember import VisionRemember, lay_weights_side_by_side
from vision_remember.tap import MultiLevelTap

_PAPER_LEVELS = (13, 18, 23)


def attach_vision_remember(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    *,
    levels: Sequence[int] | None = None,
    preset: str = "default",
    config: VisionRememberConfig | None = None,
    spec: MLLMSpec | None = None,
    **overrides: Any,
) -> VisionRememberHandle:
    """Attaches Vision Remember to a multimodal model, in place.

    The model stays the same object of the same class, with the same parameters under the same names; each chosen
    decoder layer gets a child module ``vision_remember``. With the default preset its outputs are bit for bit what they
    were until the blocks are trained. ``generate()`` works as before.

    Args:
        model: a multimodal model of transformers, or a PEFT model around one.
        layers: 0-based decoder layers before which a block runs; None for (1, 4), after the first and fourth layer.
        levels: encoder ``hidden_states`` indices; None for the paper's 13, 18, 23 of 24, scaled to the encoder's depth.
        preset: "default" (exact identity at attach) or "paper".
        config: a complete configuration instead of a preset.
        spec: the host's names, for a model that is not in the tables.
        **overrides: fields of :class:`vision_remember.VisionRememberConfig`.

    Returns:
        The handle; ``print`` it to see what was attached where.

    Raises:
        ValueError: an unknown host, layers or levels that it does not have, an unknown option, a model that is
            compiled or sharded already, or whose weights are not loaded. The model is then as it was.
        RuntimeError: Vision Remember is attached already, or a pruner is.
    """
    if find_attachment(model) is not None:
        raise RuntimeError("Vision Remember is attached to this model already; detach_vision_remember(model) first")
    if find_pruner(model) is not None:
        raise RuntimeError(
            "a pruner is attached to this model, and the blocks need every vision token; detach it first"
        )
    warn_outside_the_windows()
    refuse_compiled(model)
    if is_sharded(model):
        raise ValueError("this model is sharded already, and the blocks would not be: attach, then fully_shard")
    wanted = {"layers": layers, "levels": levels}
    chosen = {
        name: tuple(value) if isinstance(value, Iterable) else value
        for name, value in wanted.items()
        if value is not None
    }
    if config is None:
        config = VisionRememberConfig.from_preset(preset, **chosen, **overrides)
    elif isinstance(config, VisionRememberConfig):
        config = config.replace(**chosen, **overrides)
    else:
        raise ValueError(
            f"config={config!r}: expected a VisionRememberConfig, as VisionRememberConfig.from_dict makes it"
        )

    parts = resolve(model, spec)
    config, tap = plan(parts, config)
    blocks = {index: _build_block(parts, config, tap, index) for index in config.layers}
    lay_weights_side_by_side(list(blocks.values()))
    attachment = Attachment(parts, config, tap)
    attachment.install(blocks)
    return VisionRememberHandle(attachment)


def detach_vision_remember(model: nn.Module) -> None:
    """Takes Vision Remember off a model: module tree, hooks and state dict are as before attach.

    Raises:
        RuntimeError: nothing is attached.
    """
    attachment = find_attachment(model)
    if attachment is None:
        raise RuntimeError(f"no Vision Remember is attached to this {type(model).__name__}")
    attachment.uninstall()


def default_levels(depth: int) -> tuple[int, ...]:
    """The paper's levels for an encoder of ``depth`` blocks; fewer where a shallow one has them fall together."""
    return tuple(sorted(set(scale_levels(_PAPER_LEVELS, depth))))


def plan(parts: HostParts, config: VisionRememberConfig) -> tuple[VisionRememberConfig, MultiLevelTap]:
    """The configuration with everything that was left to the host filled in, and its tap. Looks, never touches.

    Raises:
        ValueError: the host does not have what the configuration asks for.
    """
    _check_layers(parts, config)
    tap = _build_tap(parts, config)
    return _completed(config, parts, tap), tap


def new_block(parts: HostParts, config: VisionRememberConfig, tap: MultiLevelTap) -> VisionRemember:
    """A block as planned, not placed in the host yet."""
    return VisionRemember.from_config(config, parts.hidden_size, feature_dim(parts, tap), num_levels=len(tap.levels))


def refuse_compiled(model: nn.Module, newcomer: str = "Vision Remember") -> None:
    """Raises ValueError for a model that is compiled already."""
    # Compiled code does not look at hooks that come later: the blocks would be ignored in silence.
    for name, module in model.named_modules():
        compiled = module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        if compiled or "_compiled_call" in module.__dict__:
            where = f" {name!r}" if name else ""
            raise ValueError(
                f"{type(module).__name__}{where} is compiled already and would not notice {newcomer}: attach to "
                "a freshly loaded model, then compile"
            )


def _check_layers(parts: HostParts, config: VisionRememberConfig) -> None:
    depth, decoder = len(parts.layers), parts.spec.decoder
    if max(config.layers) >= depth:
        raise ValueError(f"layers={list(config.layers)}: this decoder has layers 0..{depth - 1} ({decoder})")
    taken = [index for index in config.layers if hasattr(parts.layers[index], NAME)]
    if taken:
        raise ValueError(f"decoder layers {taken} have an attribute {NAME!r} of their own already")


def _build_tap(parts: HostParts, config: VisionRememberConfig) -> MultiLevelTap:
    blocks = find_module(parts.encoder, parts.encoder_spec.layers, "blocks")
    return MultiLevelTap(
        parts.encoder,
        config.levels or default_levels(len(list(blocks.children()))),
        saliency=config.saliency,
        saliency_level=config.saliency_level,
        variant=config.saliency_variant,
        center=config.saliency_center,
        temperature=config.saliency_temperature,
        spec=parts.encoder_spec,
    )


def _completed(config: VisionRememberConfig, parts: HostParts, tap: MultiLevelTap) -> VisionRememberConfig:
    projected = parts.token_grid
    if hasattr(parts.projector, "out_grid") and config.token_grid not in (None, projected):
        assert projected is not None
        raise ValueError(f"token_grid={config.token_grid}: the projector makes a grid of {projected[0]}x{projected[1]}")
    token_grid = config.token_grid or projected
    geometry = parts.spec.geometry
    cells = geometry.cells if geometry is not None else (1, 1)
    if token_grid is not None and parts.feature_grid is not None:
        cells = tuple(-(-of // by) for of, by in zip(parts.feature_grid, token_grid, strict=True))  # type: ignore[assignment]
    if cells is None and INTERACTIONS[config.interaction].local:
        raise ValueError(
            f"interaction={config.interaction!r}: the image tokens of {type(parts.model).__name__} have no place of "
            "their own, each stands for the whole image; use interaction='global'"
        )
    return config.replace(
        levels=tap.levels,
        cells=config.cells or (cells if "cells" in interaction_options(config.interaction) else None),
        saliency=tap.saliency,
        saliency_level=tap.saliency_level if tap.saliency else None,
    )


def _build_block(parts: HostParts, config: VisionRememberConfig, tap: MultiLevelTap, index: int) -> VisionRemember:
    layer = parts.layers[index]
    device, dtype = offloaded_placement(layer, parts.base) or block_placement(layer, parts.base)
    block = new_block(parts, config, tap).to(device, dtype)
    block.gradient_checkpointing = getattr(layer, "gradient_checkpointing", False)
    if block.gradient_checkpointing:
        block._gradient_checkpointing_func = layer._gradient_checkpointing_func  # type: ignore[assignment]
    return block.train(layer.training)
