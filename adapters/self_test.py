"""Finds out where a host's image tokens come from, by running the host's own code on one small image.

Every encoder block is made to return what it returned in a clean run, but NaN in some cells. A token that depends on
one of these cells comes out as NaN. So the host itself tells which cells each token stands for, whatever its projector
does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.adapters.tokens import image_tokens
from vision_remember.arrangement import Arrangement
from vision_remember.encoder import EncoderSpec, find_module
from vision_remember.grid import Grid, region, token_grid_over
from vision_remember.tap import MultiLevelTap

_PROBES = 24


@dataclass(frozen=True)
class Geometry:
    """What a host's image tokens stand for.

    Attributes:
        feature_grid: (H, W) of a tile of the sample.
        token_grid: (h, w) of its tokens; None where each token depends on the whole tile, as a resampler's do.
        exact: whether each token depends on the cells under it and on no others.
    """

    feature_grid: Grid
    token_grid: Grid | None
    exact: bool


def find_geometry(
    encoder: nn.Module,
    spec: EncoderSpec,
    get_image_features: Callable[..., Any],
    sample: dict[str, Any],
) -> list[Geometry]:
    """The geometry of the sample's tiles, one entry per size.

    Args:
        encoder: the vision encoder.
        spec: its spec, which may be a conjecture.
        get_image_features: the host's, bound.
        sample: its arguments.

    Raises:
        ValueError: the spec is wrong, or the tokens of the tiles are not simply one after the other.
    """
    blocks = find_module(encoder, spec.layers, "blocks")
    tap = MultiLevelTap(encoder, (-1,), saliency=None, spec=spec)
    with torch.no_grad(), _evaluating(encoder):
        with tap.capture() as captured, _recorded(blocks) as clean:
            total = len(_tokens(get_image_features(**sample)))
        groups = captured.groups
        assert captured._arrangement is not None
        places = _places(captured._arrangement, clean[0], spec)
        count = sum(len(group.numbers) for group in groups)
        sizes = _token_counts(groups, total, spec)
        probe = _Probe(blocks, clean, get_image_features, sample, spec.order)
        own = _own_tokens(probe, groups, places, sizes, count)
        return [
            Geometry(group.grid, *_token_grid(probe, group.grid, places[index], [own[n] for n in group.numbers]))
            for index, group in enumerate(groups)
        ]


class _Probe:
    """Runs the host with NaN in chosen places of every block's output."""

    def __init__(
        self,
        blocks: nn.Module,
        clean: list[Tensor],
        get_image_features: Callable[..., Any],
        sample: dict[str, Any],
        order: str,
    ) -> None:
        self._blocks, self._clean, self._order = blocks, clean, order
        self._run, self._sample = get_image_features, sample

    def touched(self, places: Tensor) -> Tensor:
        """(tokens,), whether each token depends on one of the places of the flattened positions."""
        return self._tokens(places, lambda cells: torch.full_like(cells, math.nan)).isnan().any(-1)

    def moved(self, places: Tensor) -> Tensor:
        """(tokens,), how far each token moves when the values at the places are other ones."""
        nowhere = places[:0]
        return (self._tokens(places, torch.neg) - self._tokens(nowhere, torch.neg)).float().norm(dim=-1)

    def _tokens(self, places: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """(tokens, D), the tokens when every block's output is changed at the places."""
        with ExitStack() as stack:
            for block, output in zip(self._blocks.children(), self._clean, strict=True):
                hidden = _last(output, self._order)
                cells = hidden.flatten(0, -2).clone()
                cells[places] = change(cells[places])
                stack.enter_context(_replaced(block, _last(cells.view(hidden.shape), self._order, back=True)))
            return _tokens(self._run(**self._sample))


def _own_tokens(
    probe: _Probe, groups: list[Any], places: list[Tensor], sizes: list[int], count: int
) -> dict[int, Tensor]:
    """The numbers of each tile's tokens.

    Raises:
        ValueError: a tile has not as many tokens as its size promises, or not side by side.
    """
    own: dict[int, Tensor] = {}
    for group, where, size in zip(groups, places, sizes, strict=True):
        for index, number in enumerate(group.numbers):
            own[number] = probe.touched(where[index]).nonzero().flatten()
            if len(own[number]) != size:
                raise ValueError(
                    f"a tile of {group.grid[0]}x{group.grid[1]} cells has {len(own[number])} image tokens, expected "
                    f"{size}; this host packs tokens in a way of its own"
                )
    joined = torch.cat([own[number] for number in range(count)])
    if not torch.equal(joined, torch.arange(len(joined), device=joined.device)):
        raise ValueError("the image tokens of the tiles do not follow one another in the order of the tiles")
    return own


def _token_counts(groups: list[Any], total: int, spec: EncoderSpec) -> list[int]:
    """Tokens per tile of each group: in proportion to the cells where sizes vary, else equal."""
    cells = [group.grid[0] * group.grid[1] for group in groups]
    tiles = [len(group.numbers) for group in groups]
    everything = sum(cell * tile for cell, tile in zip(cells, tiles, strict=True))
    by_cells = [cell * total / everything for cell in cells]
    if all(size == int(size) for size in by_cells):
        return [int(size) for size in by_cells]
    if total % sum(tiles) == 0:
        return [total // sum(tiles)] * len(groups)
    raise ValueError(f"{total} image tokens for {sum(tiles)} tiles of {everything} cells: no grid of tokens fits them")


def _token_grid(probe: _Probe, grid: Grid, places: Tensor, own: list[Tensor]) -> tuple[Grid | None, bool]:
    """The grid of a tile's tokens, None if each depends on the whole tile, and if it is exact; of the first tile.

    Raises:
        ValueError: the tokens stand for some cells each, but not in raster order.
    """
    where, tokens = places[0], own[0]
    generator = torch.Generator().manual_seed(0)
    cells_per_token = max(1.0, len(where) / len(tokens))
    # Every token is hit by about half of the probes.
    chosen = torch.rand(_PROBES, len(where), generator=generator) < 1 - 0.5 ** (1 / cells_per_token)
    chosen[:, 0] |= ~chosen.any(1)
    touched = torch.stack([probe.touched(where[probe_cells.to(where.device)])[tokens] for probe_cells in chosen]).cpu()
    token_grid = token_grid_over(grid, len(tokens))
    if token_grid is not None and torch.equal(touched, _expected(chosen, grid, token_grid)):
        return token_grid, True
    if touched.all():
        # A gate over the whole tile lets each token depend on every cell a little; a resampler, on any.
        placed = token_grid is not None and _own_cells_rule(probe, grid, token_grid, where, tokens)
        return token_grid if placed else None, False
    if token_grid is not None and _boxes_agree(probe, grid, token_grid, where, tokens):
        return token_grid, False
    raise ValueError(
        f"{len(tokens)} image tokens of a tile of {grid[0]}x{grid[1]} cells do not stand for the cells under them in "
        "raster order"
    )


def _expected(chosen: Tensor, grid: Grid, token_grid: Grid) -> Tensor:
    """(probes, tokens), whether a chosen cell lies under each token."""
    cells = chosen.view(-1, *grid)
    rows, columns = ([region(i, i + 1, t, c) for i in range(t)] for t, c in zip(token_grid, grid, strict=True))
    return torch.stack([cells[:, a:b, c:d].flatten(1).any(1) for a, b in rows for c, d in columns], dim=1)


def _own_cells_rule(probe: _Probe, grid: Grid, token_grid: Grid, where: Tensor, tokens: Tensor) -> bool:
    """Whether the row and the column of cells that move a token most lie under it or, as convolutions may have it,
    under its neighbours."""
    raster = where.view(grid)
    for axis in (0, 1):
        if token_grid[axis] == 1:
            continue
        moved = torch.stack([probe.moved(raster.select(axis, n).flatten())[tokens] for n in range(grid[axis])]).cpu()
        for token, line in enumerate(moved.argmax(0).tolist()):
            place = token // token_grid[1] if axis == 0 else token % token_grid[1]
            start, stop = region(max(place - 1, 0), min(place + 2, token_grid[axis]), token_grid[axis], grid[axis])
            if not start <= line < stop:
                return False
    return True


def _boxes_agree(probe: _Probe, grid: Grid, token_grid: Grid, where: Tensor, tokens: Tensor) -> bool:
    """Whether each token depends on the cells under it and perhaps on some around, as convolutions make it."""
    raster = where.view(grid)
    for axis in (0, 1):
        lines = [probe.touched(raster.select(axis, line).flatten())[tokens] for line in range(grid[axis])]
        seen = torch.stack(lines).cpu()  # (lines, tokens)
        for token in range(len(tokens)):
            place = token // token_grid[1] if axis == 0 else token % token_grid[1]
            start, stop = region(place, place + 1, token_grid[axis], grid[axis])
            used = seen[:, token].nonzero().flatten()
            # The cells under the token are among those it uses, save what padding cut off, and in their middle.
            if len(used) == 0 or len(used) == grid[axis] > 2 * (stop - start):
                return False
            low, high = int(used[0]), int(used[-1]) + 1
            middle = (max(low, 0) + min(high, grid[axis])) / 2
            at_edge = low == 0 or high == grid[axis]
            if not (low < stop and high > start) or (not at_edge and abs(middle - (start + stop) / 2) > stop - start):
                return False
    return True


def _places(arrangement: Arrangement, hidden: Tensor, spec: EncoderSpec) -> list[Tensor]:
    """For each group (T, H*W), the place of each cell among the flattened positions of a hidden state."""
    shape = _last(hidden, spec.order).shape[:-1]
    numbers = torch.arange(math.prod(shape), device=hidden.device).view(*shape, 1)
    return [part[..., 0] for part in arrangement.split(numbers)]


def _last(hidden: Tensor, order: str, *, back: bool = False) -> Tensor:
    """A hidden state with its channels last; ``back`` undoes it."""
    if order != "channels_first":
        return hidden
    return hidden.movedim(-1, 1) if back else hidden.movedim(1, -1)


def _tokens(output: Any) -> Tensor:
    """(N, D), all image tokens in the order of their placeholders."""
    return torch.cat([image.reshape(-1, image.shape[-1]) for image in image_tokens(output)])


@contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _recorded(blocks: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for block in blocks.children():
            stack.callback(block.register_forward_hook(keep).remove)
        yield outputs


@contextmanager
def _replaced(block: nn.Module, value: Tensor) -> Iterator[None]:
    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        return (value, *output[1:]) if isinstance(output, tuple) else value

    # First of all hooks, so that whoever else reads the block's output sees this one.
    handle = block.register_forward_hook(replace, prepend=True)
    try:
        yield
    finally:
        handle.remove()
