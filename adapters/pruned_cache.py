"""A layer of the key-value cache that holds fewer tokens than the sequence has.

It reports the length of the whole sequence, so that masks and positions are made as if nothing had been dropped; which
of their columns it holds is kept beside the keys, and follows them through beams and copies of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer


class PrunedLayer(DynamicLayer):
    """What :class:`transformers.cache_utils.DynamicLayer` is, after tokens were dropped in front of it.

    Attributes:
        columns: (B, n), the places in the sequence of its first n entries; those behind them follow one another.
        held: (B, n), which of these are tokens, not fillers of a row with fewer; None if all are.
        tail: entries behind the first n.
        seen: the length of the whole sequence so far.
    """

    _layer_type = None  # not to be taken for the layer of every new cache

    columns: Tensor
    held: Tensor | None
    tail: int
    seen: int

    @classmethod
    def of(cls, layer: DynamicLayer, batch: int, device: torch.device) -> PrunedLayer:
        """The same layer, from which nothing was dropped yet."""
        pruned = cls()
        pruned.__dict__.update(layer.__dict__)
        pruned.columns = torch.zeros(batch, 0, dtype=torch.long, device=device)
        pruned.held = None
        pruned.tail = pruned.seen = layer.get_seq_length()
        return pruned

    def advance(self, columns: Tensor | None, held: Tensor | None, length: int, tail: int = 0) -> None:
        """Notes what the layer is about to store of ``length`` more tokens.

        Args:
            columns: (B, m), their places among the ``length``; None if all are stored.
            held: (B, m), which of these are tokens; None if all are.
            length: of the sequence before any were dropped.
            tail: how many of the last of them are tokens in every row, and follow one another.
        """
        if columns is None:
            self.tail += length
        else:
            known = self.places()
            if self.held is not None or held is not None:
                self.held = torch.cat([_or_all(self.held, known), _or_all(held, columns)], dim=1)
            self.columns = torch.cat([known, columns + self.seen], dim=1)
            self.columns = self.columns[:, : self.columns.shape[1] - tail]
            self.held = None if self.held is None else self.held[:, : self.columns.shape[1]]
            self.tail = tail
        self.seen += length

    def places(self) -> Tensor:
        """(B, entries), the place of each entry in the sequence."""
        behind = torch.arange(self.seen - self.tail, self.seen, device=self.columns.device)
        return torch.cat([self.columns, behind.expand(len(self.columns), -1)], dim=1)

    def holding(self) -> Tensor | None:
        """(B, entries), which entries are tokens; None if all are."""
        if self.held is None:
            return None
        return torch.cat([self.held, self.held.new_ones(len(self.held), self.tail)], dim=1)

    def get_seq_length(self) -> int:
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        count = abs(tokens_to_remove)
        if count > self.tail:
            raise ValueError(
                f"cannot take {count} tokens back from a cache where the tokens that stay were chosen by them, all but "
                f"the last {self.tail}: assisted decoding and prompt lookup go with pruners that do not read the prompt"
            )
        super().crop(tokens_to_remove)
        self.tail -= count
        self.seen -= count

    def reset(self) -> None:
        self.columns = self.columns[:, :0]
        self.held, self.tail, self.seen = None, 0, 0
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._pick(torch.arange(len(self.columns), device=self.columns.device).repeat_interleave(repeats))

    def _pick(self, rows: Tensor) -> None:
        self.columns = self.columns[rows.to(self.columns.device)]
        self.held = None if self.held is None else self.held[rows.to(self.held.device)]


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among the keywords of a decoder layer, which transformers renamed in 5.24; None if there is none."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def pruned_layer(cache: Any, layer: nn.Module, batch: int, device: torch.device, *, make: bool) -> PrunedLayer | None:
    """The pruned layer of a cache that belongs to a decoder layer; None if it has none.

    Args:
        cache: of the call, or None.
        layer: the decoder layer.
        batch: B.
        device: of the decoder layer.
        make: make one of what stands there.

    Raises:
        ValueError: it is to be made of a layer that cannot hold fewer tokens.
    """
    if cache is None:
        return None
    attention: Any = layer.self_attn
    index: int = attention.layer_idx
    if not isinstance(cache, Cache):
        raise ValueError(f"the cache is a {type(cache).__name__}: a pruner knows the caches of transformers only")
    kind: Any = getattr(cache, "layer_class_to_replicate", None)
    if make and kind is not None:
        cache.layers.extend(kind() for _ in range(len(cache.layers), index + 1))
    found = cache.layers[index] if index < len(cache.layers) else None
    if isinstance(found, PrunedLayer):
        if found.seen == 0:  # after a reset, perhaps for a batch of another size
            found.columns = found.columns.new_zeros(batch, 0)
        return found
    if not make:
        return None
    if type(found) is not DynamicLayer or cache.offloading:
        raise ValueError(
            f"a cache of {type(found).__name__}{' that is offloaded' if cache.offloading else ''} cannot hold fewer "
            "tokens in later layers: a pruner needs a plain DynamicCache (generate() without cache_implementation)"
        )
    pruned = PrunedLayer.of(found, batch, device)
    cache.layers[index] = pruned
    return pruned


def _or_all(held: Tensor | None, columns: Tensor) -> Tensor:
    if held is None:
        return torch.ones_like(columns, dtype=torch.bool)
    return torch.cat([held, held.new_ones(len(held), columns.shape[1] - held.shape[1])], dim=1)
