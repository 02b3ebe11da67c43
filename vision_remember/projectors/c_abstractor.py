"""Honeybee's C-Abstractor: convolutions, a pooling in their middle, an MLP (arXiv 2312.06742)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.grid import Grid, check_count, check_grid, count_or
from vision_remember.projectors.adaptive_avg_pool import average_pooled
from vision_remember.projectors.base import Projector
from vision_remember.projectors.checkpoints import renamed
from vision_remember.projectors.convolutions import DepthwiseConv, SqueezeExcite
from vision_remember.projectors.end_tokens import EndTokens
from vision_remember.projectors.tables import resampled


class RegBlock(nn.Module):
    """RegNet's bottleneck with one channel per group: (B, H, W, C) -> (B, H, W, c).

    1x1, norm, SiLU; depthwise 3x3, norm, SiLU; squeeze and excite; 1x1, norm; plus the input, through a 1x1 and a norm
    where the widths differ; SiLU. The norms are over channels, position by position.

    Args:
        in_dim: C; the squeeze is a quarter as wide.
        out_dim: c.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(in_dim, out_dim, bias=False)
        self.reduce_norm = nn.LayerNorm(out_dim)
        self.depthwise = DepthwiseConv(out_dim)
        self.depthwise_norm = nn.LayerNorm(out_dim)
        self.squeeze_excite = SqueezeExcite(out_dim, round(in_dim / 4), nn.SiLU(), nn.Sigmoid())
        self.expand = nn.Linear(out_dim, out_dim, bias=False)
        self.expand_norm = nn.LayerNorm(out_dim)
        self.act = nn.SiLU()
        self.skip: nn.Module = nn.Identity()
        if in_dim != out_dim:
            self.skip = nn.Sequential(nn.Linear(in_dim, out_dim, bias=False), nn.LayerNorm(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        update = self.act(self.reduce_norm(self.reduce(x)))
        update = self.squeeze_excite(self.act(self.depthwise_norm(self.depthwise(update))))
        return self.act(self.skip(x) + self.expand_norm(self.expand(update)))


class CAbstractor(Projector):
    """Convolutional stage, adaptive average pooling, convolutional stage, MLP: (B, H*W, C) -> (B, h*w, D).

    Every token depends on all features, through the squeezes' means, and most on those around it. Honeybee reads the
    encoder's last layer, this class the one that the host's own projector reads. Honeybee's optional first norm, off by
    default, is left out.

    Args:
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio; any grid up to the features' own.
        hidden_dim: c, width of the stages; None for C.
        depth: blocks of each stage; 0 leaves the pooling and the MLP.
        mlp_depth: linear layers of the MLP, with SiLU between them.
        position_grid: grid of the learned positions that are added to the features, interpolated to features of other
            grids; None for no positions. 24x24 is CLIP-L/14-336's.
        end_tokens: learned tokens behind those of the image; see :class:`Projector`.

    Raises:
        ValueError: a negative depth, an MLP without a layer, or no grid.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        hidden_dim: int | None = None,
        depth: int = 3,
        mlp_depth: int = 2,
        position_grid: Grid | None = (24, 24),
        end_tokens: int = 0,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid)
        check_count("depth", depth, lowest=0)
        check_count("mlp_depth", mlp_depth)
        self.hidden_dim, self.depth, self.mlp_depth = count_or("hidden_dim", hidden_dim, in_dim), depth, mlp_depth
        self.position_grid: Grid | None = None
        if position_grid is not None:
            check_grid("position_grid", position_grid)
            self.position_grid = position_grid[0], position_grid[1]
            self.position = nn.Parameter(torch.empty(math.prod(position_grid), in_dim))
            nn.init.trunc_normal_(self.position, std=0.02)
        widths = [in_dim] + [self.hidden_dim] * 2 * depth
        blocks = [RegBlock(*pair) for pair in itertools.pairwise(widths)]
        self.stage_1 = nn.Sequential(*blocks[:depth])
        self.stage_2 = nn.Sequential(*blocks[depth:])
        self.readout = nn.Sequential(nn.Linear(widths[-1], out_dim))
        for _ in range(mlp_depth - 1):
            self.readout.extend((nn.SiLU(), nn.Linear(out_dim, out_dim)))
        self.end_tokens, self.end = end_tokens, EndTokens(end_tokens, out_dim)

    def options(self) -> dict[str, Any]:
        own = {
            "hidden_dim": self.hidden_dim,
            "depth": self.depth,
            "mlp_depth": self.mlp_depth,
            "position_grid": self.position_grid,
            "end_tokens": self.end_tokens,
        }
        return {**super().options(), **own}

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        if self.position_grid is not None:
            features = features + resampled(self.position, self.position_grid, grid)
        cells = self.stage_1(features.unflatten(1, grid)).flatten(1, 2)
        cells = average_pooled(cells, grid, out_grid).unflatten(1, out_grid)
        return self.end(self.readout(self.stage_2(cells).flatten(1, 2)))

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of Honeybee's release under our names.

        Args:
            state_dict: those of its ``abstractor``, without that prefix. A position for the CLS token, as in the first
                releases, is dropped.

        Raises:
            ValueError: a weight of another module.
        """
        parts = {
            "conv1.conv": "reduce",
            "conv1.bn": "reduce_norm",
            "conv2.conv": "depthwise",
            "conv2.bn": "depthwise_norm",
            "se.fc1": "squeeze_excite.squeeze",
            "se.fc2": "squeeze_excite.excite",
            "conv3.conv": "expand",
            "conv3.bn": "expand_norm",
            "downsample.conv": "skip.0",
            "downsample.bn": "skip.1",
        }
        weights = dict(state_dict)
        position, end = weights.pop("pos_emb", None), weights.pop("eos_tokens", None)
        names = {}
        for module in {key.rpartition(".")[0] for key in weights}:
            in_stage = re.fullmatch(r"net\.(0|2)\.b(\d+)\.(.+)", module)
            if in_stage and in_stage[3] in parts:
                names[module] = f"stage_{1 if in_stage[1] == '0' else 2}.{int(in_stage[2]) - 1}.{parts[in_stage[3]]}"
            elif module.startswith("readout."):
                names[module] = module
        imported = renamed(weights, names)
        if position is not None:
            has_cls = math.isqrt(position.shape[1]) ** 2 != position.shape[1]
            imported["position"] = position[0, 1:] if has_cls else position[0]
        if end is not None:
            imported["end.tokens"] = end[0]
        return imported
