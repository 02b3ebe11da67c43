"""Parts of convolutional projectors, channels last: all but the depthwise convolution are plain linear layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.grid import Grid


class DepthwiseConv(nn.Conv2d):
    """3x3 convolution of each channel by itself, zero-padded: (B, H, W, C) -> (B, ceil(H/rows), ceil(W/columns), C).

    Args:
        dim: C.
        bias: whether it has one.
    """

    def __init__(self, dim: int, *, bias: bool = False) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, bias=bias)

    def forward(self, x: Tensor, stride: Grid = (1, 1)) -> Tensor:
        """The stride (rows, columns) comes with the call, as it may depend on the grid; no weight does."""
        convolved = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, stride, padding=1, groups=self.groups)
        return convolved.permute(0, 2, 3, 1)


class SqueezeExcite(nn.Module):
    """Scales each channel by what the whole map's mean says: (B, H, W, C) -> the same.

    Args:
        dim: C.
        squeeze_dim: width between its two layers.
        act: after the first layer.
        gate: after the second, into [0, 1].
    """

    def __init__(self, dim: int, squeeze_dim: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.squeeze = nn.Linear(dim, squeeze_dim)
        self.act = act
        self.excite = nn.Linear(squeeze_dim, dim)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(1, 2), keepdim=True)
        return x * self.gate(self.excite(self.act(self.squeeze(mean))))
