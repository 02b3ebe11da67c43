"""What the projectors' tests share: small projectors, their features, and rasters as images and as sequences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vision_remember import build_projector
from vision_remember.grid import Grid

C, D = 8, 12


def projector(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_projector(name, C, D, **options)


def random_features(grid: Grid, dim: int = C, *, seed: int = 1) -> Tensor:
    return torch.randn(2, math.prod(grid), dim, generator=torch.Generator().manual_seed(seed))


def image(x: Tensor, grid: Grid) -> Tensor:
    return x.transpose(1, 2).unflatten(2, grid)


def sequence(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def randomised(state: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {key: torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5 for key, shape in state.items()}


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
