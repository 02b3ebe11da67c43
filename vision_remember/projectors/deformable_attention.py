"""Deformable attention over one level of features: each query chooses where to look (Deformable DETR, 2010.04159)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vision_remember.grid import Grid, check_count
from vision_remember.ops import deformable_sample


class DeformableAttention(nn.Module):
    """Reads features at a few learned offsets around each query's reference point.

    Starts as Deformable DETR does: head m of M looks in the direction 2πm/M, its k-th point k steps away, whatever the
    query is; all points weigh the same.

    Args:
        dim: E, width of queries, features and output.
        num_heads: heads M, a divisor of E.
        num_points: points per head.

    Raises:
        ValueError: the heads do not divide the width, or no points.
    """

    def __init__(self, dim: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        check_count("num_heads", num_heads)
        check_count("num_points", num_points)
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide the attention width {dim}")
        self.num_heads, self.num_points = num_heads, num_points
        self.offsets = nn.Linear(dim, num_heads * num_points * 2)
        self.weights = nn.Linear(dim, num_heads * num_points)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.offsets.weight)
        with torch.no_grad():
            self.offsets.bias.copy_(_radial_offsets(num_heads, num_points).flatten())
        for parameter in self.weights.parameters():
            nn.init.zeros_(parameter)
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Tensor, features: Tensor, *, references: Tensor, step: tuple[float, float], grid: Grid
    ) -> Tensor:
        """(B, N, E) queries over (B, H*W, E) features -> (B, N, E).

        Args:
            query: (B, N, E).
            features: (B, H*W, E).
            references: (N, 2), as (x, y); 0 to 1 spans the image.
            step: what an offset of one means in x and in y, in the same unit.
            grid: (H, W).
        """
        heads, points = self.num_heads, self.num_points
        # The references' precision decides: a place on the image needs more than half precision.
        offsets = self.offsets(query).to(references.dtype).unflatten(-1, (heads, 1, points, 2))
        moves = torch.stack((offsets[..., 0] * step[0], offsets[..., 1] * step[1]), dim=-1)
        locations = references[:, None, None, None] + moves  # (B, N, heads, levels, points, 2)
        weights = self.weights(query).unflatten(-1, (heads, 1, points)).softmax(-1)
        values = self.value(features).unflatten(-1, (heads, -1))
        return self.out(deformable_sample([values], locations, weights, grids=[grid]).flatten(2))


def axis_places(first: float, last: float, count: int, like: Tensor) -> Tensor:
    """``count`` evenly spaced places from ``first`` to ``last``, the middle if one; float32 at the least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if count == 1:
        first = last = (first + last) / 2
    return torch.linspace(first, last, count, dtype=dtype, device=like.device)


def raster_points(rows: Tensor, columns: Tensor) -> Tensor:
    """(h,) and (w,) places -> (h*w, 2) points as (x, y), row by row."""
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def _radial_offsets(heads: int, points: int) -> Tensor:
    """(heads, points, 2): k times the direction 2πm/M, stretched to the border of the unit box."""
    angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    return directions[:, None] * torch.arange(1, points + 1)[:, None]
