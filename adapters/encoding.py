"""Encoding with memory: the host encodes images as it always does, and what the tap saw becomes a memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.adapters.activation_checkpointing import refuse_reentrant
from vision_remember.adapters.packing import recorded_outputs, trace_packing
from vision_remember.adapters.resolve import projected_grid, trained_copy
from vision_remember.adapters.spec import MLLMSpec
from vision_remember.adapters.tokens import image_tokens
from vision_remember.captured import Captured, CapturedGroup
from vision_remember.encoder import find_module
from vision_remember.grid import Grid, token_grid_over
from vision_remember.memory import Tiles, VisionMemory, memories, spans
from vision_remember.tap import MultiLevelTap
from vision_remember.threads import RunStack


class Encoding:
    """Runs a host's encoding methods and keeps what the tap sees.

    Args:
        model: the host.
        spec: its names.
        tap: reads its encoder.
        token_grid: (h, w) of a tile's tokens; None to derive it.
        layers: the decoder layers with blocks.
    """

    def __init__(
        self, model: nn.Module, spec: MLLMSpec, tap: MultiLevelTap, token_grid: Grid | None, layers: Sequence[nn.Module]
    ) -> None:
        self._model, self._spec, self._tap = model, spec, tap
        self._token_grid = token_grid
        self._layers = list(layers)
        self._running: RunStack[bool] = RunStack()

    @property
    def running(self) -> bool:
        """Whether this thread is encoding: hosts call one encoding method from another."""
        return self._running.innermost() is not None

    def run(
        self, base: nn.Module, method: Callable[..., Any], modality: str, *args: Any, **kwargs: Any
    ) -> tuple[Any, tuple[VisionMemory, ...]]:
        """What the host's method returns, and the memories of it.

        Args:
            base: the host's module.
            method: its method, not bound.
            modality: "image" or "video".
            *args: of the method.
            **kwargs: of the method.
        """
        projector = self._projector()
        outputs: AbstractContextManager[list[Tensor]] = (
            nullcontext([]) if self._spec.plain or projector is None else recorded_outputs(projector)
        )
        with self._running.running(True):
            with self._tap.record() as captured, outputs as projected:
                output = method(base, *args, **kwargs)
            return output, self._memories(base, method, modality, output, captured, projected, *args, **kwargs)

    def _memories(
        self,
        base: nn.Module,
        method: Callable[..., Any],
        modality: str,
        output: Any,
        captured: Captured,
        projected: list[Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[VisionMemory, ...]:
        if captured.empty:
            encoder = trained_copy(find_module(self._model, self._spec.encoder, "vision encoder"))
            if encoder is not self._tap.encoder:
                raise ValueError(
                    f"the vision encoder {self._spec.encoder!r} was replaced or copied (by PEFT's modules_to_save, for "
                    "one) after Vision Remember was attached: detach, and attach behind get_peft_model"
                )
            raise ValueError(
                f"{type(base).__name__} encodes {modality} by another module than the vision encoder "
                f"{self._spec.encoder!r}; Vision Remember cannot follow it, run inside `with vr.disabled():`"
            )
        projector = self._projector()
        images = image_tokens(output)
        counts = [len(image) for image in images]
        groups = captured.groups
        tile_count = sum(len(group.numbers) for group in groups)
        ends = getattr(projector, "end_tokens", 0)
        grids = [self._tokens_of(group, sum(counts) // max(tile_count, 1)) for group in groups]
        if self._spec.plain:
            tiles = _tiles_of(counts, groups, grids, ends)
            slots = _slots_before_ends(tile_count, grids[0], ends) if ends else None
        else:
            per_tile = projected[-1].shape[1]
            if modality == "video" and per_tile != grids[0][0] * grids[0][1]:
                # Hosts pool frames before their projector.
                grids = [token_grid_over(groups[0].grid, per_tile) or grids[0]]
            _check_tokens([per_tile], grids[0])
            recorded = self._returned(captured, projected[-1])
            packing = trace_packing(base, method, recorded, grids[0], *args, **kwargs)
            slots, tiles, grids = packing.slots, packing.tiles, [packing.token_grid or grids[0]]
        sizes = [self._tiles(group, grid) for group, grid in zip(groups, grids, strict=True)]
        return memories(sizes, spans(counts, tiles), slots)

    def _projector(self) -> nn.Module | None:
        path = self._spec.projector
        return None if path is None else find_module(self._model, path, "projector")

    def _tokens_of(self, group: CapturedGroup, tokens: int) -> Grid:
        return self._token_grid or projected_grid(self._projector(), self._spec.geometry, group.grid, tokens)

    def _returned(self, captured: Captured, projected: Tensor) -> tuple[dict[str, Any], str]:
        """What the base's children returned, by attribute, and which of them is the projector."""
        assert self._spec.projector is not None
        base = f"{self._spec.base}." if self._spec.base else ""
        encoder, projector = (path.removeprefix(base) for path in (self._spec.encoder, self._spec.projector))
        return {encoder: captured.output, projector: projected}, projector

    def _tiles(self, group: CapturedGroup, token_grid: Grid) -> Tiles:
        levels = group.levels
        # Inputs of a frozen encoder may require grad (activation checkpointing does that); its features need none, and
        # two checkpointed layers must not share a graph.
        if not self._encoder_trains():
            levels = tuple(level.detach() for level in levels)
        elif any(level.requires_grad for level in levels):
            refuse_reentrant(self._layers)
        return Tiles(group.numbers, levels, group.saliency, group.grid, token_grid)

    def _encoder_trains(self) -> bool:
        """Whether anything of the encoder does, a projector inside it aside."""
        projector = self._projector()
        aside = set() if projector is None else set(map(id, projector.parameters()))
        return any(p.requires_grad and id(p) not in aside for p in self._tap.encoder.parameters())


def _slots_before_ends(tiles: int, token_grid: Grid, ends: int) -> Tensor:
    """Which of all tiles' tokens each image token is, where ``ends`` tokens of no place follow each tile's."""
    count = token_grid[0] * token_grid[1]
    numbers = torch.arange(tiles * count).view(tiles, count)
    return torch.nn.functional.pad(numbers, (0, ends), value=-1).flatten()


def _tiles_of(counts: list[int], groups: list[CapturedGroup], grids: list[Grid], ends: int) -> list[int]:
    """How many tiles each image has, so that their tokens, and ``ends`` more for each, are the image's.

    Raises:
        ValueError: no number of tiles has as many tokens.
    """
    lengths = {number: h * w + ends for group, (h, w) in zip(groups, grids, strict=True) for number in group.numbers}
    tiles, number = [], 0
    for count in counts:
        first, held = number, 0
        while held < count and number < len(lengths):
            held, number = held + lengths[number], number + 1
        if held != count:
            _check_tokens([count - ends], grids[0])
            raise ValueError(f"an image has {count} vision tokens, but its tiles have {held}")
        tiles.append(number - first)
    if number < len(lengths):
        raise ValueError(f"the encoder made {len(lengths)} tiles, but the images' tokens fill {number}")
    return tiles


def _check_tokens(counts: list[int], token_grid: Grid) -> None:
    """Raises ValueError unless every tile has the tokens of its grid."""
    h, w = token_grid
    wrong = [count for count in counts if count != h * w]
    if wrong:
        raise ValueError(
            f"the projector made {wrong[0]} vision tokens of a tile, but token_grid={h}x{w} has {h * w}; give its grid "
            "to attach_vision_remember(model, token_grid=(rows, columns))"
        )
