"""Encoder levels that are never joined: their widths, their norm, their product with one weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.grid import check_count
from vision_remember.ops.transforms import is_transformed

FeatureNorm = Literal["per_level", "joint", "none"]

Features = Tensor | Sequence[Tensor]
"""(B, H*W, C), the levels joined on channels, or one (B, H*W, c) per level: the two mean the same."""

LEVEL_NORM_EPS = 1e-5


def are_features(value: object) -> TypeGuard[Features]:
    """Whether ``value`` is :data:`Features`, not an image that an interaction has prepared (a named tuple)."""
    return isinstance(value, Tensor) or type(value) in (list, tuple)


def level_widths(feature_dim: int, num_levels: int, level_dims: Sequence[int] | None) -> tuple[int, ...]:
    """c of each level: ``level_dims``, or ``num_levels`` equal parts of C.

    Raises:
        ValueError: levels that do not make up C.
    """
    if level_dims is None:
        check_count("feature_dim", feature_dim)
        check_count("num_levels", num_levels)
        if feature_dim % num_levels:
            raise ValueError(f"num_levels={num_levels} must divide feature_dim={feature_dim}")
        return (feature_dim // num_levels,) * num_levels
    if sum(level_dims) != feature_dim or min(level_dims) < 1 or num_levels not in (1, len(level_dims)):
        raise ValueError(
            f"level_dims={list(level_dims)}: expected {'positive widths' if num_levels == 1 else num_levels} "
            f"that sum up to feature_dim={feature_dim}"
        )
    return tuple(level_dims)


class LevelNorm(nn.Module):
    """Layer norm of levels, over each level's channels or over those of all levels together.

    It has no weights of its own: the projections that follow would absorb them.

    Args:
        level_dims: c of each level.
        kind: "per_level", "joint" or "none".

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, level_dims: Sequence[int], kind: FeatureNorm) -> None:
        super().__init__()
        if kind not in ("per_level", "joint", "none"):
            raise ValueError(f"feature_norm={kind!r}: expected 'per_level', 'joint' or 'none'")
        self.level_dims, self.kind = tuple(level_dims), kind

    def forward(self, features: Features) -> Features:
        """Features -> features of the same widths. A joined tensor stays one where all its levels are as wide."""
        if self.kind == "none":
            return features
        if isinstance(features, Tensor):
            if self.kind == "joint":
                return F.layer_norm(features, features.shape[-1:], eps=LEVEL_NORM_EPS)
            if len(set(self.level_dims)) == 1:
                grouped = features.unflatten(-1, (len(self.level_dims), self.level_dims[0]))
                return F.layer_norm(grouped, grouped.shape[-1:], eps=LEVEL_NORM_EPS).flatten(-2)
        levels = split_levels(features, self.level_dims)
        if self.kind == "per_level":
            return [F.layer_norm(level, level.shape[-1:], eps=LEVEL_NORM_EPS) for level in levels]
        return _normalised_together(levels)

    def extra_repr(self) -> str:
        return f"{list(self.level_dims)}, {self.kind!r}"


def _normalised_together(levels: Sequence[Tensor]) -> list[Tensor]:
    """Layer norm over the channels of all levels, which are not joined."""
    # Half precision keeps too few digits for a variance.
    wide = [level.to(torch.promote_types(level.dtype, torch.float32)) for level in levels]
    channels = sum(level.shape[-1] for level in wide)
    mean = torch.stack([level.sum(-1, keepdim=True) for level in wide]).sum(0) / channels
    centred = [level - mean for level in wide]
    variance = torch.stack([level.square().sum(-1, keepdim=True) for level in centred]).sum(0) / channels
    scale = (variance + LEVEL_NORM_EPS).rsqrt()
    return [(x * scale).to(level.dtype) for x, level in zip(centred, levels, strict=True)]


class LevelLinear(nn.Linear):
    """A linear layer over all levels together. Of levels that are not joined it sums the products with their columns
    of the weight, which is the same without a copy that holds them all."""

    def forward(self, features: Features) -> Tensor:
        """Features -> (B, H*W, out_features)."""
        if isinstance(features, Tensor):
            return super().forward(features)
        weights = self.weight.split([level.shape[-1] for level in features], dim=1)
        total = F.linear(features[0], weights[0], self.bias).flatten(0, -2)
        # In place where no gradient may need the sum so far: out of place it is copied first. Autocast narrows the
        # arguments of the latter alone, and vmap knows no other. Compiled code is functional by itself.
        copying = torch.is_grad_enabled() or torch.is_autocast_enabled(total.device.type)
        copying = copying or torch.compiler.is_compiling() or is_transformed()
        for level, weight in zip(features[1:], weights[1:], strict=True):
            total = (total.addmm if copying else total.addmm_)(level.flatten(0, -2), weight.t())
        return total.view(*features[0].shape[:-1], self.out_features)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is of this very class and nothing is hooked to it, so that its weights tell what it does.

    A forward of its own is a hook too: accelerate's, which brings offloaded weights.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return type(module) is kind and not hooks and "forward" not in module.__dict__


class LevelStack(nn.Module):
    """A linear layer for each level, the results one after the other on the axis of cells.

    Args:
        level_dims: c of each level.
        out_dim: width of the results.
    """

    def __init__(self, level_dims: Sequence[int], out_dim: int) -> None:
        super().__init__()
        self.level_dims = tuple(level_dims)
        self.levels = nn.ModuleList(nn.Linear(width, out_dim, bias=False) for width in level_dims)

    def forward(self, features: Features) -> Tensor:
        """Features -> (B, levels*H*W, out_dim)."""
        parts = split_levels(features, self.level_dims)
        return torch.cat([linear(part) for linear, part in zip(self.levels, parts, strict=True)], dim=1)


def split_levels(features: Features, level_dims: Sequence[int]) -> Sequence[Tensor]:
    """The levels, as views where they are joined."""
    return features.split(list(level_dims), dim=-1) if isinstance(features, Tensor) else features


def projected(module: nn.Module, features: Features) -> Tensor:
    """``module`` of ``features``. A stranger in its place, a LoRA or quantised layer, knows joined levels only."""
    if not isinstance(features, Tensor) and not isinstance(module, (LevelLinear, LevelStack)):
        features = torch.cat(tuple(features), dim=-1)
    result: Tensor = module(features)
    return result
