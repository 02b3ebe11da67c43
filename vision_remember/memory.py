"""What one forward pass carries from the vision encoder to the decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vision_remember.grid import Grid
from vision_remember.layout import VisionLayout
from vision_remember.ops.triton_rows import can_find, find_places
from vision_remember.side_stream import SideWork, run_beside


@dataclass(frozen=True)
class Span:
    """One image, as the host hands it over.

    Attributes:
        rows: its image tokens, newlines and the like included, as a range over all images' tokens.
        tiles: its tiles, as a range.
    """

    rows: range
    tiles: range


def spans(tokens: Sequence[int], tiles: Sequence[int]) -> tuple[Span, ...]:
    """The spans of images one after the other, from the numbers of their image tokens and tiles."""
    rows, cuts = ([0, *accumulate(counts)] for counts in (tokens, tiles))
    return tuple(Span(range(rows[i], rows[i + 1]), range(cuts[i], cuts[i + 1])) for i in range(len(tokens)))


@dataclass(frozen=True)
class Tiles:
    """The features of tiles of one size.

    Attributes:
        numbers: the tiles' places among all tiles of the call.
        levels: one (T, H*W, c) for each encoder level, raster order.
        saliency: (T, H*W), or None.
        feature_grid: (H, W).
        token_grid: (h, w).
    """

    numbers: tuple[int, ...]
    levels: tuple[Tensor, ...]
    saliency: Tensor | None
    feature_grid: Grid
    token_grid: Grid


@dataclass(frozen=True)
class VisionMemory:
    """The features of tiles of one size.

    A call whose images have several sizes has a memory for each; they number the image tokens alike, and what is a cell
    of one stands for no part of the image in the others.

    Attributes:
        levels: one (T, H*W, c) for each encoder level, raster order.
        saliency: (T, H*W), or None.
        feature_grid: (H, W).
        token_grid: (h, w), the grid of the vision tokens that stand for a tile.
        spans: the images.
        slots: (R,) on the CPU: for each image token, the one of the T*h*w tokens of all tiles that it is, or -1 where
            it stands for no part of the image. None where the image tokens are all tiles' tokens in order.
    """

    levels: tuple[Tensor, ...]
    saliency: Tensor | None
    feature_grid: Grid
    token_grid: Grid
    spans: tuple[Span, ...]
    slots: Tensor | None = None

    @property
    def tile_tokens(self) -> int:
        """h*w."""
        return self.token_grid[0] * self.token_grid[1]

    def recall_images(self, images: Sequence[int], placeholders: Tensor, *, by_kernel: bool = False) -> Recall:
        """The recall for whole images, which may repeat (beams).

        Args:
            images: numbers of the images whose tokens the placeholders take, in order.
            placeholders: (B, S), where image tokens go.
            by_kernel: search for them by a kernel of ours where that suits: for blocks that read by kernels as well.
        """
        spans = [self.spans[image] for image in images]
        tiles = [tile for span in spans for tile in span.tiles]
        # Counts are known from shapes alone, so nothing has to wait for the device.
        positions = _positions(placeholders, sum(len(span.rows) for span in spans), by_kernel)
        slots = None
        if self.slots is not None:
            kept, slots = self._place(spans)
            device = placeholders.device
            positions, slots = positions.index_select(0, kept.to(device)), slots.to(device)
        return Recall(((self._take(tiles), VisionLayout(positions, slots, len(tiles), self.token_grid)),))

    def recall_rows(self, rows: Tensor, placeholders: Tensor) -> Recall:
        """The recall for any part of the image tokens, as a chunk of a prefill holds them.

        Args:
            rows: (N,), numbers of the image tokens that the placeholders take, in order. With beams several sequences
                hold the same ones, so each gets tiles of its own.
            placeholders: (B, S), where image tokens go.
        """
        sequences, length = placeholders.shape
        positions = _positions(placeholders, len(rows), False)
        count = len(self.levels[0])
        slots = rows if self.slots is None else self.slots.to(rows.device)[rows]
        own = positions // length * (count * self.tile_tokens) + slots
        spare = sequences * count * self.tile_tokens
        layout = VisionLayout(positions, own.where(slots >= 0, spare), sequences * count, self.token_grid)
        return Recall(((self._take(list(range(count)) * sequences), layout),))

    @classmethod
    def nothing(cls, level_dims: Sequence[int], like: Tensor) -> Recall:
        """A recall without any image, through which a block's parameters still take part in a training step."""
        levels = tuple(torch.zeros(0, 1, width, dtype=like.dtype, device=like.device) for width in level_dims)
        positions = torch.zeros(0, dtype=torch.long, device=like.device)
        return Recall(((cls(levels, None, (1, 1), (1, 1), ()), VisionLayout(positions, None, 0, (1, 1))),))

    def _place(self, spans: list[Span]) -> tuple[Tensor, Tensor]:
        """Of all rows of ``spans`` in order, those that stand for cells, and their slots in the spans' tiles."""
        assert self.slots is not None
        # Empty ones first: torch.cat refuses an empty list.
        nothing = self.slots.new_zeros(0)
        kept, placed = [nothing], [nothing]
        first_row, first_tile = 0, 0
        for span in spans:
            slots = self.slots[span.rows.start : span.rows.stop]
            inside = (slots >= 0).nonzero().squeeze(1)
            kept.append(inside + first_row)
            placed.append(slots[inside] + (first_tile - span.tiles.start) * self.tile_tokens)
            first_row += len(span.rows)
            first_tile += len(span.tiles)
        return torch.cat(kept), torch.cat(placed)

    def _take(self, tiles: list[int]) -> VisionMemory:
        """The memory of these tiles, in this order."""
        if tiles == list(range(len(self.levels[0]))):
            return self
        saliency = None if self.saliency is None else self.saliency[tiles]
        return replace(self, levels=tuple(level[tiles] for level in self.levels), saliency=saliency)


def memories(sizes: Sequence[Tiles], images: tuple[Span, ...], slots: Tensor | None = None) -> tuple[VisionMemory, ...]:
    """The memories of one call, one for each size of tiles.

    Args:
        sizes: the tiles by size.
        images: the images; their tiles are numbered over all sizes.
        slots: (R,) on the CPU, which of the tokens of all tiles each image token is, -1 where it is none; None where
            they are simply all tokens, tile by tile.
    """
    if len(sizes) == 1:
        (only,) = sizes
        return (VisionMemory(only.levels, only.saliency, only.feature_grid, only.token_grid, images, slots),)
    lengths = {number: tiles.token_grid[0] * tiles.token_grid[1] for tiles in sizes for number in tiles.numbers}
    starts = [0, *accumulate(lengths[number] for number in range(len(lengths)))]
    if slots is None:
        slots = torch.arange(starts[-1])
    return tuple(_of_one_size(tiles, images, slots, starts) for tiles in sizes)


def _of_one_size(tiles: Tiles, images: tuple[Span, ...], slots: Tensor, starts: list[int]) -> VisionMemory:
    length = tiles.token_grid[0] * tiles.token_grid[1]
    own = torch.full_like(slots, -1)
    for place, number in enumerate(tiles.numbers):
        inside = (slots >= starts[number]) & (slots < starts[number + 1])
        own[inside] = slots[inside] - starts[number] + place * length
    counts = [sum(number in image.tiles for number in tiles.numbers) for image in images]
    cuts = [0, *accumulate(counts)]
    spans = tuple(Span(image.rows, range(cuts[i], cuts[i + 1])) for i, image in enumerate(images))
    return VisionMemory(tiles.levels, tiles.saliency, tiles.feature_grid, tiles.token_grid, spans, own)


@dataclass(frozen=True)
class Recall:
    """Memories, and where their tokens stand in the sequences of one decoder call.

    Attributes:
        parts: a memory and a layout for each size of tiles; no position belongs to two of them.
        text: (B, S), true where text stands, for blocks that are guided by text; else None.
        ready: blocks, each with what was prepared for it of each part, or None for those that were not.
        side_work: to be joined before anything of ``ready`` is read; None where it was made on the current stream.
    """

    parts: tuple[tuple[VisionMemory, VisionLayout], ...]
    text: Tensor | None = None
    ready: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = ()
    side_work: SideWork | None = None

    @classmethod
    def joined(cls, recalls: Iterable[Recall], text: Tensor | None = None) -> Recall:
        """The recall of all of them, and where text stands."""
        return cls(tuple(part for recall in recalls for part in recall.parts), text)

    def prepared(
        self, blocks: Sequence[Any], prepare: Callable[..., list[Any]], *, side_stream: bool = False
    ) -> Recall:
        """This recall with what the blocks need of the images, so that their calls have less to do.

        Args:
            blocks: as :meth:`through` will get them.
            prepare: as :func:`vision_remember.remember.prepare_together`.
            side_stream: on a GPU, and without gradients, beside what the current stream is asked to do until a block
                reads; see :func:`vision_remember.side_stream.run_beside`.
        """

        def make() -> list[list[Any]]:
            return [
                prepare(
                    blocks,
                    memory.levels,
                    feature_grid=memory.feature_grid,
                    token_grid=memory.token_grid,
                    saliency=memory.saliency,
                )
                for memory, _ in self.parts
            ]

        made, side_work = run_beside(make, self._features()) if side_stream else (make(), None)
        # Not by dataclasses.replace, into which the oldest torch's compiler does not look.
        return Recall(self.parts, self.text, tuple(zip(blocks, zip(*made, strict=True), strict=True)), side_work)

    def through(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D), the vision tokens replaced by what ``block`` makes of them.

        Args:
            block: called as :meth:`vision_remember.VisionRemember.forward` is.
            hidden: the residual stream. Its device decides where the work is done.

        Raises:
            ValueError: the residual stream has another shape, as that of a decoder with several parallel streams.
        """
        if hidden.ndim != 3:
            raise ValueError(f"the decoder's hidden states have shape {tuple(hidden.shape)}, expected (B, S, D)")
        own = [made for owner, made in self.ready if owner is block]
        ready = own[0] if own else (None,) * len(self.parts)
        parts = list(zip(self.parts, ready, strict=True))
        if self.side_work is not None and any(made is not None for made in ready):
            self.side_work.join()
        if all(_is_rewritten_in_place(block, hidden, layout, made) for (_, layout), made in parts):
            rewrite: Callable[..., Tensor] = block.rewrite  # type: ignore[attr-defined]
            for (memory, layout), made in parts:
                hidden = rewrite(hidden, layout.positions, made, tiles=layout.tiles, token_grid=memory.token_grid)
            return hidden
        columns = [self._arguments(block, *part, hidden, made) for part, made in parts]
        if len(columns) == 1:
            tokens, features, options = columns[0]
            written: list[Tensor] = [block(tokens, features, **options)]
        else:
            # One call for all sizes: sharded weights are gathered once, however many sizes a process has.
            options = {name: [column[2][name] for column in columns] for name in columns[0][2]}
            written = block([column[0] for column in columns], [column[1] for column in columns], **options)
        for (_, layout), rewritten in zip(self.parts, written, strict=True):
            hidden = layout.scatter(hidden, rewritten)
        return hidden

    def _features(self) -> list[Tensor]:
        """Levels and saliency of all parts."""
        maps = [memory.saliency for memory, _ in self.parts if memory.saliency is not None]
        return [*(level for memory, _ in self.parts for level in memory.levels), *maps]

    def _arguments(
        self, block: Callable[..., Any], memory: VisionMemory, layout: VisionLayout, hidden: Tensor, ready: Any
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """Tokens, features, or what is ready of them, and options of a block's call for tiles of one size."""
        device = hidden.device
        options: dict[str, Any] = {
            "token_grid": memory.token_grid,
            "feature_grid": memory.feature_grid,
            "saliency": None if memory.saliency is None or ready is not None else memory.saliency.to(device),
        }
        mixer: Any = getattr(block, "token_mixer", None)
        if mixer is not None:
            options["present"] = layout.present(device)
            if mixer.kind == "text_guided":
                nowhere = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=device)
                options["text"] = layout.text_before(hidden, nowhere if self.text is None else self.text.to(device))
        if ready is not None:
            return layout.gather(hidden), ready, options
        levels = [level.to(device) for level in memory.levels]
        return layout.gather(hidden), levels[0] if len(levels) == 1 else levels, options


def _is_rewritten_in_place(block: Callable[..., Any], hidden: Tensor, layout: VisionLayout, ready: Any) -> bool:
    """Whether the block rewrites rows where they stand: it was prepared for that, and no token is missing."""
    if ready is None or layout.slots is not None or not hasattr(block, "rewrites"):
        return False
    return bool(block.rewrites(hidden, ready))


def _positions(placeholders: Tensor, count: int, by_kernel: bool) -> Tensor:
    """(count,), indices of the placeholders in the flattened sequences; row i of the image tokens fills the i-th."""
    mask = placeholders.flatten()
    if by_kernel and can_find(mask):
        return find_places(mask, count)
    return torch.nonzero_static(mask, size=count).squeeze(1)
