"""Saliency maps: how much each patch matters, read off one query row of the vision encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from vision_remember.registry import Registry

Center = Literal["none", "mean", "zscore"]

_EPS = 1e-6


def _logit(logits: Tensor) -> Tensor:
    return logits.mean(1).sigmoid()


def _boost(logits: Tensor) -> Tensor:
    return 1 + _logit(logits)


def _head_sigmoid(logits: Tensor) -> Tensor:
    return logits.sigmoid().mean(1)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1).mean(1).sigmoid()


def _softmax_sum(logits: Tensor) -> Tensor:
    return logits.softmax(-1).sum(1).sigmoid()


def _relative(logits: Tensor) -> Tensor:
    share = logits.softmax(-1).mean(1) * logits.shape[-1]
    return share / (1 + share)


SALIENCY_VARIANTS: Registry[Callable[[Tensor], Tensor]] = Registry(
    "saliency variant",
    {
        "logit": _logit,
        "boost": _boost,
        "head_sigmoid": _head_sigmoid,
        "softmax": _softmax,
        "softmax_sum": _softmax_sum,
        "relative": _relative,
    },
)


def cls_saliency(
    cls_query: Tensor,
    patch_keys: Tensor,
    *,
    variant: str = "logit",
    center: Center = "none",
    temperature: float = 1.0,
) -> Tensor:
    """Saliency of each patch as the CLS token sees it (Vision Remember, eq. 3).

    The equation is lost in the text that circulates; its where-clause names the query, the keys and the head size and
    no softmax. The default reads it as the sigmoid of the head-mean attention logit. The row need not be a CLS
    token's: with the mean of all queries it is the mean attention that each patch receives, before the softmax.

    Args:
        cls_query: (B, heads, d), the CLS token's query in one encoder layer.
        patch_keys: (B, heads, N, d), the patches' keys in the same layer.
        variant: how logits ``l = q.k / sqrt(d)`` become a map.

            - "logit": ``sigmoid(mean_h l)``. Uses all of (0, 1), but training never pins the offset of ``l``, so on
              some encoders the map saturates; ``center`` helps.
            - "boost": ``1 + sigmoid(mean_h l)``, in (1, 2): it strengthens what matters and takes nothing away.
            - "head_sigmoid": ``mean_h sigmoid(l)``. One head alone cannot saturate the map.
            - "softmax": ``sigmoid(mean_h softmax(l))``. Nearly the constant 0.5, because a softmax over hundreds of
              patches is nearly 0; offered because the equation can be read so.
            - "softmax_sum": the same with the sum over heads; between 0.5 and 1.
            - "relative": ``p / (1 + p)`` with ``p`` the patch's attention relative to a uniform share; 0.5 where
              attention is uniform, uses all of (0, 1).
        center: applied to the head-mean offset of the logits: "mean" subtracts it, so that the average patch sits
            at 0.5; "zscore" also divides by the standard deviation over patches.
        temperature: divides the logits; larger is flatter.

    Returns:
        (B, N), in (0, 1), but for "boost".

    Raises:
        ValueError: shapes that do not fit, an unknown variant or centre, a temperature that is not positive.
    """
    if cls_query.ndim != 3 or patch_keys.ndim != 4 or (*patch_keys.shape[:2], patch_keys.shape[3]) != cls_query.shape:
        raise ValueError(
            f"cls_query {tuple(cls_query.shape)}, patch_keys {tuple(patch_keys.shape)}: "
            "expected (B, heads, d) and (B, heads, N, d)"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: expected a positive number")
    to_map = SALIENCY_VARIANTS[variant]
    logits = (patch_keys @ cls_query.unsqueeze(-1)).squeeze(-1) / (math.sqrt(cls_query.shape[-1]) * temperature)
    return to_map(_centered(logits.float() if logits.dtype.itemsize < 4 else logits, center))


def _centered(logits: Tensor, center: Center) -> Tensor:
    """(B, heads, N) -> (B, heads, N), all heads shifted alike, so that their differences stay."""
    if center == "none":
        return logits
    if center not in ("mean", "zscore"):
        raise ValueError(f"center={center!r}: expected 'none', 'mean' or 'zscore'")
    logits = logits - logits.mean((1, 2), keepdim=True)
    if center == "zscore":
        logits = logits / (logits.mean(1, keepdim=True).std(-1, unbiased=False, keepdim=True) + _EPS)
    return logits
