"""One forward pass through the decoder while tokens are dropped between its layers.

All that a pass has to remember travels with it, in a keyword that every layer is given; what later passes need stands
in the cache. So nothing can be stale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.adapters.decoder_queries import query_attention
from vision_remember.adapters.pruned_cache import PrunedLayer
from vision_remember.adapters.shortening import Cut
from vision_remember.pruning import DecoderPruner, Kept, Tokens


class Passage:
    """A call's tokens on their way through the layers.

    Args:
        pruner: drops tokens.
        depth: the number of layers.
        vision: (B, S), where vision tokens stand.
        padding: (B, p + S), what is not padding, p tokens of earlier calls first; None if nothing is known to be.
        report: called at the end with (layers, B) numbers of vision tokens that each layer was given.
    """

    def __init__(
        self,
        pruner: DecoderPruner,
        depth: int,
        vision: Tensor,
        padding: Tensor | None,
        report: Callable[[Tensor], None],
    ) -> None:
        self._pruner, self._stages = pruner, pruner.stages(depth)
        self._vision, self._padding, self._report = vision, padding, report
        self._length = vision.shape[1]
        self._real = torch.ones_like(vision) if padding is None else padding[:, -self._length :].bool()
        self._left = vision & self._real
        self._initial = self._left.sum(1)
        self._queries: Tensor | None = None
        self._attention: tuple[Tensor, Tensor] | None = None
        self._whole: Tensor | None = None
        self._given: list[Tensor] = []
        self.cut: Cut | None = None

    @property
    def length(self) -> int:
        """S."""
        return self._length

    def enter(
        self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], stored: Callable[[], Any]
    ) -> Tensor:
        """The states that a layer is to be given: (B, m, D) of (B, m', D), fewer in front of a stage's layer.

        Args:
            index: the layer's number.
            layer: the layer.
            hidden: the states as they come.
            kwargs: the layer's keywords, made for the whole sequence.
            stored: finds what the layer's cache holds from earlier calls: an empty one, or a layer of it.
        """
        if index == 0:
            with torch.autocast(hidden.device.type, enabled=False):  # it would narrow what is to be compared
                self._queries = self._pruner.queries(hidden.detach(), self._vision & self._real, self._real)
        for number, stage in enumerate(self._stages):
            if stage.layer == index:
                if stage.attention_of == index:
                    self._attention = self._look(layer, hidden, kwargs, stored())
                hidden = self._drop(number, hidden)
        if any(stage.attention_of == index < stage.layer for stage in self._stages):
            self._attention = self._look(layer, hidden, kwargs, stored())
        self._given.append(self._left.sum(1))
        return hidden

    def leave(self, hidden: Tensor) -> Tensor:
        """(B, m, D) behind the last layer -> (B, S, D): dropped tokens are in the state in which they were dropped."""
        self._report(torch.stack([given.cpu() for given in self._given]))
        if self.cut is None:
            return hidden
        assert self._whole is not None
        return self.cut.put(hidden, self._whole.to(hidden))

    def _columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B, m) the places of the tokens that are left, and which are no fillers."""
        if self.cut is None:
            columns = torch.arange(self._length, device=device).expand(len(self._vision), -1)
            return columns, torch.ones_like(columns, dtype=torch.bool)
        columns = self.cut.columns.to(device)
        held = self.cut.held
        return columns, torch.ones_like(columns, dtype=torch.bool) if held is None else held.to(device)

    def _look(self, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], stored: Any) -> tuple[Tensor, Tensor]:
        """Weights (B, heads, Q, m) of the queries in a layer, and which are counted, (B, Q)."""
        assert self._queries is not None
        device = hidden.device
        columns, held = self._columns(device)
        asking = self._queries.to(device).gather(1, columns) & held
        places, counted = members_first(asking)
        cos, sin = kwargs["position_embeddings"]
        tables = (cos, sin) if self.cut is None else (self.cut.take(cos), self.cut.take(sin))
        visible = columns[:, None, :] <= columns.gather(1, places)[..., None]
        visible = visible & (held & self._real.to(device).gather(1, columns))[:, None]
        known = None
        if stored is not None and stored.get_seq_length() > 0:
            known = stored.keys
            visible = torch.cat([self._known(stored, device)[:, None].expand(-1, places.shape[1], -1), visible], dim=2)
        return query_attention(layer, hidden, places, tables, visible, known), counted

    def _known(self, stored: Any, device: torch.device) -> Tensor:
        """(B, p), which keys of earlier calls count."""
        if isinstance(stored, PrunedLayer):
            columns, held = stored.places().to(device), stored.holding()
        else:
            columns = torch.arange(stored.get_seq_length(), device=device).expand(len(self._vision), -1)
            held = None
        real = torch.ones_like(columns, dtype=torch.bool)
        if self._padding is not None:
            real = self._padding.to(device).bool().gather(1, columns)
        return real if held is None else real & held.to(device)

    def _drop(self, number: int, hidden: Tensor) -> Tensor:
        device = hidden.device
        columns, held = self._columns(device)
        weights, counted = self._attention if self._attention is not None else (None, None)
        vision = self._left.to(device).gather(1, columns) & held
        tokens = Tokens(hidden, vision, self._initial.to(device), weights, counted)
        with torch.autocast(device.type, enabled=False):
            kept: Kept = self._pruner.choose(number, tokens)
        self._attention = None
        # Padding goes too: it would be all that a short row holds.
        stays = held & self._real.to(device).gather(1, columns) & (~vision | kept.vision)
        dropped, *counts = torch.cat([(vision & ~kept.vision).sum()[None], stays.sum(1)]).tolist()
        if dropped == 0:
            return kept.hidden
        if self.cut is None or self._whole is None:
            self._whole = hidden
        else:
            self._whole = self.cut.put(hidden, self._whole.to(hidden))
        places, filled = members_first(stays)
        places, order = places.sort(1)
        left = columns.gather(1, places)
        no_fillers = None if min(counts) == max(counts) else filled.gather(1, order)
        tail = 0 if self._pruner.reads_prompt else _tail(left, no_fillers, self._length)
        self.cut = Cut(left, no_fillers, self._length, tail)
        # Fillers are still true in `held` of the tokens that were there; what is left of the vision tokens is not.
        self._left = torch.zeros_like(self._left, device=device).scatter(1, columns, vision & kept.vision)
        return kept.hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def members_first(members: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q) places of each row's members, a row with fewer filled up with others; and (B, Q) which are members."""
    counts = members.sum(1)
    width = max(1, int(counts.max()))
    real = torch.arange(width, device=members.device) < counts[:, None]
    # Stable: members first, in order.
    return (~members).to(torch.uint8).argsort(dim=1, stable=True)[:, :width], real


def _tail(columns: Tensor, held: Tensor | None, length: int) -> int:
    """How many of the last columns are tokens in every row and follow one another to the sequence's end."""
    distance = torch.arange(columns.shape[1] - 1, -1, -1, device=columns.device)
    whole = (columns == length - 1 - distance) if held is None else (columns == length - 1 - distance) & held
    return int(whole.all(0).flip(0).cumprod(0).sum())
