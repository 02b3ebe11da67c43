"""Deformable sampling: every query reads each level of features at a few places of its own choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_remember.grid import Grid, check_grid, check_length


def deformable_sample(values: Sequence[Tensor], locations: Tensor, weights: Tensor, *, grids: Sequence[Grid]) -> Tensor:
    """The sampling of deformable attention (Deformable DETR, eq. 3), without its projections.

    For each query and head: the sum over levels and points of ``weight * value(location)``, where a value between cells
    is interpolated bilinearly. Locations are fractions of the image: cell (i, j) of an H x W level has its centre at
    ``x = (j + 0.5) / W``, ``y = (i + 0.5) / H``, so that one location means the same place on every level. Outside the
    outermost centres the image fades to zero within one cell.

    Args:
        values: one tensor (B, H_l*W_l, heads, d) per level, raster order.
        locations: (B, N, heads, levels, points, 2), as (x, y); 0 to 1 spans the image. Kept in its own precision: a
            half-precision number is too coarse for a place on a large grid, so give float32 with half-precision values.
        weights: (B, N, heads, levels, points), used as they are, not normalised.
        grids: (H_l, W_l) of each level.

    Returns:
        (B, N, heads, d), in the dtype of the values.

    Raises:
        ValueError: shapes, levels or grids that do not fit together; the message names them.
    """
    _check(values, locations, weights, grids)
    batch, queries, heads = locations.shape[:3]
    dtype = torch.promote_types(values[0].dtype, locations.dtype)
    # grid_sample counts from -1 to 1; heads join the batch, since each looks at places of its own.
    places = (2 * locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)  # (B*heads, N, levels, points, 2)
    shares = weights.to(dtype).transpose(1, 2).flatten(0, 1).unsqueeze(1)  # (B*heads, 1, N, levels, points)
    parts = []
    for level, (value, grid) in enumerate(zip(values, grids, strict=True)):
        cells = value.to(dtype).permute(0, 2, 3, 1).reshape(batch * heads, value.shape[-1], *grid)  # (B*heads, d, H, W)
        read = F.grid_sample(cells, places[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False)
        parts.append((read * shares[:, :, :, level]).sum(-1))  # (B*heads, d, N)
    sampled = sum(parts[1:], start=parts[0])
    return sampled.reshape(batch, heads, values[0].shape[-1], queries).permute(0, 3, 1, 2).to(values[0].dtype)


def _check(values: Sequence[Tensor], locations: Tensor, weights: Tensor, grids: Sequence[Grid]) -> None:
    if not values or len(values) != len(grids):
        raise ValueError(f"{len(values)} levels of values and {len(grids)} grids: expected as many, at least one")
    # Compared one by one, not as a set: sizes that torch.export leaves open have no hash.
    kinds = [(value.shape[0], value.shape[2:], value.dtype) for value in values]
    if values[0].ndim != 4 or any(kind != kinds[0] for kind in kinds):
        found = ", ".join(f"{tuple(value.shape)} {value.dtype}" for value in values)
        raise ValueError(f"values {found}: expected (B, H*W, heads, d), only H*W differing from level to level")
    for level, (value, grid) in enumerate(zip(values, grids, strict=True)):
        check_grid(f"grids[{level}]", grid)
        check_length(f"values[{level}]", value.shape[1], f"grids[{level}]", grid)
    batch, _, heads, _ = values[0].shape
    shape = tuple(locations.shape)
    if len(shape) != 6 or (shape[0], *shape[2:4], shape[5]) != (batch, heads, len(values), 2):
        raise ValueError(f"locations {shape}: expected (B={batch}, N, heads={heads}, levels={len(values)}, points, 2)")
    if tuple(weights.shape) != shape[:-1]:
        raise ValueError(f"weights {tuple(weights.shape)}: expected {shape[:-1]}, one per location")
