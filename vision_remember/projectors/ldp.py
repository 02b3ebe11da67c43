"""The lightweight downsample projectors of MobileVLM: LDP (arXiv 2312.16886) and LDPv2 (arXiv 2402.03766)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from vision_remember.grid import Grid
from vision_remember.projectors.adaptive_avg_pool import average_pooled
from vision_remember.projectors.checkpoints import renamed
from vision_remember.projectors.convolutions import DepthwiseConv, SqueezeExcite
from vision_remember.projectors.mlp import MLPProjector


class InvertedResidual(nn.Module):
    """MobileNetV3's block without expansion: (B, H, W, D) -> (B, ceil(H/rows), ceil(W/columns), D).

    Depthwise 3x3, norm, Hardswish; squeeze and excite; 1x1, norm; plus its input where the stride is one.

    Args:
        dim: D; the squeeze is a quarter as wide.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(dim)
        self.depthwise_norm = nn.LayerNorm(dim)
        self.act = nn.Hardswish()
        self.squeeze_excite = SqueezeExcite(dim, dim // 4, nn.ReLU(), nn.Hardsigmoid())
        self.pointwise = nn.Linear(dim, dim, bias=False)
        self.pointwise_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, stride: Grid = (1, 1)) -> Tensor:
        update = self.act(self.depthwise_norm(self.depthwise(x, stride)))
        update = self.pointwise_norm(self.pointwise(self.squeeze_excite(update)))
        return x + update if stride == (1, 1) else update


class LDP(MLPProjector):
    """LLaVA's MLP, then two MobileNet blocks, the second with a stride: (B, H*W, C) -> (B, h*w, D).

    MobileVLM's stride is 2, a ratio of 4. Every token depends on all features, through the squeeze's mean. The 3x3 of a
    stride beyond 3 steps over features, which then reach the tokens through the first block alone.

    Args:
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token; its root is the stride.
        out_grid: (h, w) instead of a ratio; one that a stride makes: ceil(H / stride), and alike for the columns.
        act: "gelu" or "gelu_tanh", between the two linear layers.
        bias: whether the two linear layers have a bias.

    Raises:
        ValueError: an unknown ``act``.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        act: Literal["gelu", "gelu_tanh"] = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid, act=act, bias=bias)
        self.block_1 = InvertedResidual(out_dim)
        self.block_2 = InvertedResidual(out_dim)

    def stride(self, grid: Grid, out_grid: Grid) -> Grid:
        """Cells (rows, columns) from token to token."""
        if self.fixed_grid is None:
            side = math.isqrt(self.ratio or 1)
            return side, side
        return -(-grid[0] // out_grid[0]), -(-grid[1] // out_grid[1])

    def out_grid(self, grid: Grid) -> Grid:
        out_grid = super().out_grid(grid)
        rows, columns = self.stride(grid, out_grid)
        h, w = -(-grid[0] // rows), -(-grid[1] // columns)
        if (h, w) != out_grid:
            raise ValueError(
                f"out_grid={out_grid[0]}x{out_grid[1]}: no stride makes it of the features' grid {grid[0]}x{grid[1]}; "
                f"a stride of {rows}x{columns} makes {h}x{w}"
            )
        return out_grid

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        cells = self.mlp(features).unflatten(1, grid)  # (B, H, W, D)
        return self.block_2(self.block_1(cells), self.stride(grid, out_grid)).flatten(1, 2)

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of MobileVLM's release under our names.

        Args:
            state_dict: those of its ``mm_projector``, without that prefix.

        Raises:
            ValueError: a weight of another module.
        """
        names = {"model.mlp.1": "linear_1", "model.mlp.3": "linear_2"}
        parts = {
            "0.0": "depthwise",
            "0.1": "depthwise_norm",
            "1.fc1": "squeeze_excite.squeeze",
            "1.fc2": "squeeze_excite.excite",
            "2.0": "pointwise",
            "2.1": "pointwise_norm",
        }
        for i in (1, 2):
            names |= {f"model.mb_block.{i}.block.{their}": f"block_{i}.{our}" for their, our in parts.items()}
        return renamed(state_dict, names)


class LDPv2(MLPProjector):
    """LLaVA's MLP, adaptive average pooling, plus a depthwise 3x3 of the result: (B, H*W, C) -> (B, h*w, D).

    The convolution tells the tokens their surroundings, 10 D parameters in all. MobileVLM V2 always makes 12x12 tokens;
    here the grid is free. Where the grids do not divide, the pooling's cells overlap.

    Args:
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio; any grid up to the features' own.
        act: "gelu" or "gelu_tanh", between the two linear layers.
        bias: whether the two linear layers have a bias.

    Raises:
        ValueError: an unknown ``act``.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        act: Literal["gelu", "gelu_tanh"] = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid, act=act, bias=bias)
        self.position = DepthwiseConv(out_dim, bias=True)

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        pooled = average_pooled(self.mlp(features), grid, out_grid)
        return pooled + self.position(pooled.unflatten(1, out_grid)).flatten(1, 2)

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of MobileVLM V2's release under our names.

        Args:
            state_dict: those of its ``mm_projector``, without that prefix.

        Raises:
            ValueError: a weight of another module.
        """
        return renamed(state_dict, {"mlp.mlp.0": "linear_1", "mlp.mlp.2": "linear_2", "peg.peg.0": "position"})
