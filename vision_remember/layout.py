"""Which position of a sequence is which vision token.

Notation of the whole library: B sequences, S positions, D decoder width; T tiles (one per image, more where a host cuts
images up), each with a token grid (h, w) and a feature grid (H, W); C feature width, N positions that hold a vision
token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vision_remember.grid import Grid


@dataclass(frozen=True)
class VisionLayout:
    """The vision tokens of one decoder call, on any device: a host may spread its layers over several.

    Attributes:
        positions: (N,), indices into the flattened (B*S) positions, ascending.
        slots: (N,), the token of the flattened (T*h*w) tokens that each position holds; None where they are simply all
            tokens in order (N = T*h*w). A call may hold a part of the tokens, as chunked prefill does; none twice. The
            number T*h*w itself marks a position that holds no vision token and stays as it is.
        tiles: T.
        token_grid: (h, w) of each tile.
    """

    positions: Tensor
    slots: Tensor | None
    tiles: int
    token_grid: Grid

    def gather(self, hidden: Tensor) -> Tensor:
        """(B, S, D) -> (T, h*w, D); tokens that this call does not hold are zero."""
        h, w = self.token_grid
        tokens = hidden.flatten(0, 1).index_select(0, self.positions.to(hidden.device))
        if self.slots is not None:
            # One more for the positions that hold no vision token.
            slots, filled = self.slots.to(hidden.device), tokens.new_zeros(self.tiles * h * w + 1, hidden.shape[-1])
            filled = filled.index_copy(0, slots, tokens)
            tokens = filled[:-1]
        return tokens.reshape(self.tiles, h * w, hidden.shape[-1])

    def present(self, device: torch.device) -> Tensor | None:
        """(T, h*w), on ``device``: whether this call holds each token; None if it holds all."""
        if self.slots is None:
            return None
        h, w = self.token_grid
        held = torch.zeros(self.tiles * h * w + 1, dtype=torch.bool, device=device)
        return held.index_fill(0, self.slots.to(device), True)[:-1].view(self.tiles, h * w)

    def text_before(self, hidden: Tensor, text: Tensor) -> Tensor:
        """(B, S, D) and (B, S) bool -> (T, D), the mean state of the text in front of each tile.

        Text behind an image must not count: a causal model does not know it yet. Zero where there is none in front.
        """
        length, count = hidden.shape[1], self.tiles * self.token_grid[0] * self.token_grid[1]
        positions = self.positions.to(hidden.device)
        slots = torch.arange(count, device=hidden.device) if self.slots is None else self.slots.to(hidden.device)
        # The first position of each tile; those of no tile and of no token come last and are cut off.
        tile = slots // (self.token_grid[0] * self.token_grid[1])
        first = torch.full((self.tiles + 1,), hidden.shape[0] * length - 1, device=hidden.device)
        first = first.scatter_reduce(0, tile.clamp(max=self.tiles), positions, "amin")[:-1]
        # Wide: the sum over a long text may leave float16's range. Chosen, not multiplied: padding may hold a NaN.
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).where(text[..., None], 0)
        sums, counts = wide.cumsum(1).flatten(0, 1), text.cumsum(1).flatten()
        return (sums[first] / counts[first].clamp(min=1)[:, None]).to(hidden.dtype)

    def scatter(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(B, S, D) and (T, h*w, D) -> (B, S, D), the vision positions replaced, all others as they were."""
        flat, tokens = hidden.flatten(0, 1), tokens.flatten(0, 1)
        positions = self.positions.to(hidden.device)
        if self.slots is not None:
            count, slots = len(tokens), self.slots.to(hidden.device)
            held = tokens.index_select(0, slots.clamp(max=count - 1))
            tokens = held.where((slots < count)[:, None], flat.index_select(0, positions))
        # Out of place: the hidden states may be a view or be needed by the backward pass.
        return flat.index_copy(0, positions, tokens).view_as(hidden)
