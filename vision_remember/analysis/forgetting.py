"""The forgetting curve: what a linear probe can still read off vision tokens, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ForgettingCurve:
    """Scores of linear probes along the decoder, on images that they were not fitted on.

    Attributes:
        remembered: (layers + 1,), with Vision Remember: the states that enter each layer, its block's update included,
            and those that leave the last one.
        plain: (layers + 1,), the same without Vision Remember.
        score: "accuracy" (share of right answers) or "r2" (1 is perfect, 0 no better than the mean; may be negative).
        fitted: tokens that each probe was fitted on.
        tested: tokens that it was scored on.
    """

    remembered: Tensor
    plain: Tensor
    score: str
    fitted: int
    tested: int


def linear_probe(states: Tensor, targets: Tensor, train: Tensor, *, ridge: float = 1e-3) -> float:
    """Fits ridge regression in closed form on some rows and scores it on the others.

    With X the standardised states and Y the centred targets of the n training rows, ``W = (X'X + ridge*n*I)^-1 X'Y``.
    Computed in float64; the result depends on nothing random.

    Args:
        states: (N, D).
        targets: (N,) whole numbers of any kind, classes, fitted as one-hot vectors; or (N, K) real numbers.
        train: (N,) bool, the rows to fit on; the others are scored.
        ridge: strength of the penalty, above 0.

    Returns:
        Accuracy for classes. R2 for numbers, all columns together; NaN if the scored targets are constant. NaN if the
        states are not finite.

    Raises:
        ValueError: shapes that do not fit, no row on one side, a ridge that is not positive.
    """
    classes = targets.ndim == 1 and not targets.is_floating_point()
    if states.ndim != 2 or train.shape != states.shape[:1] or len(targets) != len(states) or targets.ndim > 2:
        raise ValueError(
            f"states {tuple(states.shape)}, targets {tuple(targets.shape)}, train {tuple(train.shape)}: expected "
            "(N, D), (N,) or (N, K), and (N,)"
        )
    if not classes and targets.ndim != 2:
        raise ValueError("targets of one dimension are classes, whole numbers: give real numbers as (N, 1)")
    if not ridge > 0:
        raise ValueError(f"ridge={ridge}: expected a positive number")
    train = train.bool()
    if train.all() or not train.any():
        raise ValueError(
            f"{int(train.sum())} of {len(train)} rows are for fitting: expected some, and some to score on"
        )
    if classes:  # numbered anew: one column for each that there is
        targets = targets.unique(return_inverse=True)[1]
    x, y = states.double(), torch.nn.functional.one_hot(targets).double() if classes else targets.double()
    mean, spread = x[train].mean(0), x[train].std(0, unbiased=False)
    # A channel that never changes says nothing.
    x = (x - mean) / spread.where(spread > 0, torch.ones_like(spread))
    centre = y[train].mean(0)
    fitted, wanted = x[train], y[train] - centre
    count, width = fitted.shape
    if width <= count:
        gram = fitted.T @ fitted + ridge * count * torch.eye(width, dtype=x.dtype, device=x.device)
        weights = torch.linalg.solve(gram, fitted.T @ wanted)
    else:  # the same by the smaller system
        gram = fitted @ fitted.T + ridge * count * torch.eye(count, dtype=x.dtype, device=x.device)
        weights = fitted.T @ torch.linalg.solve(gram, wanted)
    found = x[~train] @ weights + centre
    if not found.isfinite().all():
        return float("nan")
    if classes:
        return float((found.argmax(-1) == targets[~train]).double().mean())
    truth = y[~train]
    total = (truth - truth.mean(0)).square().sum()
    return float(1 - (found - truth).square().sum() / total) if total > 0 else float("nan")
