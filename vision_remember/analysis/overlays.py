"""Maps over images: what the encoder finds salient, and which cells a vision token re-reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import Grid, region
from vision_remember.memory import Span, VisionMemory


@dataclass(frozen=True)
class SaliencyMap:
    """The saliency of one image.

    Attributes:
        tiles: (T, H, W), each tile's cells as the encoder sees them, in the order in which it sees them.
        stitched: (rows, columns), one map over the whole image: that of its only tile, or of the tiles side by side as
            the host stitches them, their padding cut off. None where a host keeps tiles apart.
    """

    tiles: Tensor
    stitched: Tensor | None

    def resized(self, height: int, width: int) -> Tensor:
        """(height, width), the stitched map over the image's pixels, bilinear.

        Raises:
            ValueError: the host keeps the image's tiles apart.
        """
        if self.stitched is None:
            raise ValueError(
                f"the host keeps the {len(self.tiles)} tiles of this image apart, so where they lie in it is not "
                "known: use .tiles"
            )
        return F.interpolate(self.stitched[None, None], size=(height, width), mode="bilinear")[0, 0]


@dataclass(frozen=True)
class RegionAttention:
    """Where vision tokens look when they re-read the image in front of one decoder layer.

    Attributes:
        weights: (T, heads, h*w, H*W), rows sum to 1; zero for cells that a token does not see. T tiles of all images.
        token_grid: (h, w).
        feature_grid: (H, W).
        window: tokens on a side of the blocks that share a region; None where every token sees all cells.
    """

    weights: Tensor
    token_grid: Grid
    feature_grid: Grid
    window: int | None

    def over_tile(self, tile: int, row: int, column: int) -> Tensor:
        """(heads, H, W), one token's weights over its whole tile.

        Raises:
            ValueError: there is no such tile, row or column.
        """
        h, w = self.token_grid
        if not (0 <= tile < len(self.weights) and 0 <= row < h and 0 <= column < w):
            raise ValueError(
                f"tile {tile}, row {row}, column {column}: there are {len(self.weights)} tiles of {h}x{w} tokens"
            )
        return self.weights[tile, :, row * w + column].unflatten(-1, self.feature_grid)

    def in_region(self, tile: int, row: int, column: int) -> Tensor:
        """(heads, rows, columns), one token's weights over the cells of its region alone.

        Raises:
            ValueError: there is no such tile, row or column.
        """
        weights = self.over_tile(tile, row, column)
        if self.window is None:
            return weights
        spans = []
        for at, tokens, cells in zip((row, column), self.token_grid, self.feature_grid, strict=True):
            first = at - at % self.window
            spans.append(slice(*region(first, min(first + self.window, tokens), tokens, cells)))
        return weights[:, spans[0], spans[1]]


def saliency_maps(memories: tuple[VisionMemory, ...]) -> tuple[SaliencyMap, ...]:
    """The maps of the images of one call.

    Args:
        memories: of the call, one for each size of tiles, with saliency.

    Raises:
        ValueError: a memory without saliency.
    """
    if any(memory.saliency is None for memory in memories):
        raise ValueError(
            "the images were encoded without saliency: attach with saliency='auto', if this encoder can give any"
        )
    maps = []
    for image in range(len(memories[0].spans)):
        # All tiles of an image have one size.
        held = [memory for memory in memories if len(memory.spans[image].tiles)]
        maps.append(_map(held[0], held[0].spans[image]))
    return tuple(maps)


def _map(memory: VisionMemory, span: Span) -> SaliencyMap:
    assert memory.saliency is not None
    tiles = memory.saliency[span.tiles.start : span.tiles.stop].unflatten(1, memory.feature_grid)
    if len(tiles) == 1:
        return SaliencyMap(tiles, tiles[0])
    lines = _lines(memory, span)
    if lines is None:
        return SaliencyMap(tiles, None)
    # The cells under each token, in blocks of one size; where regions overlap, their means.
    (h, w), (H, W) = memory.token_grid, memory.feature_grid
    rows, columns = (H // h, W // w) if H % h == 0 and W % w == 0 else (1, 1)
    fine = F.adaptive_avg_pool2d(tiles[:, None], (h * rows, w * columns))
    blocks = fine.view(len(tiles), h, rows, w, columns).transpose(2, 3).flatten(0, 2)
    stitched = blocks[lines.to(blocks.device)].transpose(1, 2)
    return SaliencyMap(tiles, stitched.flatten(2, 3).flatten(0, 1))


def _lines(memory: VisionMemory, span: Span) -> Tensor | None:
    """(rows, columns), the slots, among the image's tiles, of the stitched tokens; None where nothing is stitched.

    Hosts that stitch put an overview of the whole image first, then the stitched rows, each with a newline.
    """
    if memory.slots is None:
        return None
    slots = memory.slots[span.rows.start : span.rows.stop].cpu()
    first, overview = span.tiles.start * memory.tile_tokens, memory.tile_tokens
    rest = slots[overview:]
    ends = (rest < 0).nonzero().flatten()
    if not torch.equal(slots[:overview], torch.arange(first, first + overview)) or not len(ends):
        return None
    columns, left = divmod(len(rest), len(ends))
    rows = rest.view(len(ends), columns) if not left else rest[None]
    if columns < 2 or bool((rows[:, :-1] < 0).any()) or bool((rows[:, -1] >= 0).any()):
        return None
    return rows[:, :-1] - first
