"""The arguments of a decoder layer, cut to the tokens that are left.

A decoder makes mask, positions and rotary tables once, for all of its layers and the whole sequence. Layers behind a
pruner hold fewer tokens, now and in their cache, and are given the rows and columns of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.adapters.pruned_cache import PrunedLayer


@dataclass(frozen=True)
class Cut:
    """The tokens of a call that are left.

    Attributes:
        columns: (B, m), their places in the call's sequence of S, rising. A row with fewer is filled up with dropped
            ones.
        held: (B, m), which of them are left, not fillers; None if all are.
        length: S.
        tail: how many of the last of them may be taken back: tokens in every row, that nothing depends on.
    """

    columns: Tensor
    held: Tensor | None
    length: int
    tail: int = 0

    def take(self, values: Tensor) -> Tensor:
        """(B or 1, S, ...) -> (B, m, ...)."""
        columns = self.columns.to(values.device)
        values = values.expand(len(columns), *values.shape[1:])
        wide = columns.view(*columns.shape, *[1] * (values.ndim - 2)).expand(*columns.shape, *values.shape[2:])
        return values.gather(1, wide)

    def put(self, values: Tensor, into: Tensor) -> Tensor:
        """(B, m, D) written over (B, S, D) where they are left; fillers stay what they were."""
        columns = self.columns.to(values.device)[..., None].expand_as(values)
        if self.held is not None:
            values = values.where(self.held.to(values.device)[..., None], into.gather(1, columns))
        return into.scatter(1, columns, values)


def shortened(
    layer: nn.Module, kwargs: dict[str, Any], cut: Cut | None, stored: PrunedLayer | None, length: int
) -> dict[str, Any]:
    """The keywords of a decoder layer for the tokens that are left.

    Args:
        layer: the layer.
        kwargs: made for the whole sequence.
        cut: the call's tokens that are left; None if all are.
        stored: the layer's cache, before the call's tokens are put into it; None if it holds every token.
        length: S.

    Raises:
        ValueError: a mask or rotary tables in a form that is not known here.
    """
    kwargs = dict(kwargs)
    kwargs["attention_mask"] = _mask(layer, kwargs.get("attention_mask"), cut, stored, length)
    if cut is None:
        return kwargs
    tables = kwargs.get("position_embeddings")
    if tables is not None:
        kwargs["position_embeddings"] = tuple(_rotary(table, cut) for table in tables)
    if isinstance(kwargs.get("position_ids"), Tensor):
        # Flash attention takes gaps in positions for the ends of packed sequences.
        kwargs["position_ids"] = None if _is_flash(layer) else _rotary(kwargs["position_ids"], cut)
    return kwargs


def _rotary(table: Tensor, cut: Cut) -> Tensor:
    if table.ndim not in (2, 3) or table.shape[1] != cut.length:
        raise ValueError(
            f"positions of shape {tuple(table.shape)}: a pruner knows one for each token, (B, {cut.length}, ...)"
        )
    return cut.take(table)


def _mask(layer: nn.Module, mask: Any, cut: Cut | None, stored: PrunedLayer | None, length: int) -> Tensor | None:
    """The mask for the rows and columns that are left; None stays None unless fillers have to be hidden."""
    columns, held = _key_columns(cut, stored, length)
    if mask is None and held is None:
        return None
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"an attention mask of {type(mask).__name__}: a pruner knows those of eager, sdpa and flash attention"
        )
    if _is_flash(layer):
        kept = torch.ones_like(columns, dtype=torch.bool) if mask is None else mask.gather(1, columns.to(mask.device))
        return kept if held is None else kept & held.to(kept)
    rows = columns[:, -length:] if cut is None else cut.columns + (columns.new_full((), _seen(stored)))
    if mask is None:
        mask = rows[:, None, :, None] >= columns[:, None, None, :]
    else:
        mask = mask.expand(len(columns), *mask.shape[1:])
        if cut is not None:
            mask = mask.gather(2, _wide(cut.columns, mask, rows=True))
        mask = mask.gather(3, _wide(columns, mask, rows=False))
    if held is None:
        return mask
    held = held.to(mask.device)[:, None, None, :]
    return mask & held if mask.dtype == torch.bool else mask.masked_fill(~held, torch.finfo(mask.dtype).min)


def _key_columns(cut: Cut | None, stored: PrunedLayer | None, length: int) -> tuple[Tensor, Tensor | None]:
    """(B, keys) the places of a layer's keys in the whole sequence, and which are no fillers, None if none is."""
    if cut is None:
        assert stored is not None
        new: Tensor = torch.arange(length, device=stored.columns.device).expand(len(stored.columns), -1)
        new_held = None
    else:
        new, new_held = cut.columns, cut.held
    if stored is None:
        return new, new_held
    known, known_held = stored.places(), stored.holding()
    columns = torch.cat([known, new.to(known.device) + stored.seen], dim=1)
    if known_held is None and new_held is None:
        return columns, None
    parts = (
        torch.ones_like(known, dtype=torch.bool) if known_held is None else known_held,
        torch.ones_like(new, dtype=torch.bool) if new_held is None else new_held,
    )
    return columns, torch.cat([part.to(known.device) for part in parts], dim=1)


def _seen(stored: PrunedLayer | None) -> int:
    return 0 if stored is None else stored.seen


def _wide(columns: Tensor, mask: Tensor, *, rows: bool) -> Tensor:
    """Indices into rows or columns of a (B, heads, S, keys) mask."""
    columns = columns.to(mask.device)
    if rows:
        return columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    return columns[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)


def _is_flash(layer: nn.Module) -> bool:
    config: Any = layer.self_attn.config  # type: ignore[union-attr]
    return "flash" in config._attn_implementation
