"""What every projector is: features of an image in, fewer tokens of the decoder's width out."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from vision_remember.grid import Grid, check_count, check_grid, check_length, square_grid


class Projector(nn.Module):
    """Base of all projectors. A subclass implements :meth:`project`.

    Args:
        in_dim: C, width of one level of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token; its root is taken per axis, rounded up where it does not divide: 4 makes 24x24 into
            12x12 and 27x27 into 14x14.
        out_grid: (h, w) instead of a ratio. With neither, the grid stays as it is.

    Raises:
        ValueError: both a ratio and a grid, a ratio that is not the square of a whole number, or a width that is no
            positive whole number.
    """

    encoder_levels: ClassVar[tuple[int, ...]] = ()
    """``hidden_states`` indices of a 24-block encoder whose features it reads, joined on channels in this order; other
    depths scale them. Empty: the one level that the host's own projector reads."""

    spatial: ClassVar[bool] = True
    """Whether token (i, j) stands for the cells under it. Otherwise the tokens have no order in the image."""

    needs_text: ClassVar[bool] = False
    """Whether ``forward`` also needs ``text``, a vector of the question to each image."""

    end_tokens: int = 0
    """Learned tokens behind those of the grid, the same for every image. They stand for no cells."""

    def __init__(self, in_dim: int, out_dim: int, *, ratio: int | None = None, out_grid: Grid | None = None) -> None:
        super().__init__()
        check_count("in_dim", in_dim)
        check_count("out_dim", out_dim)
        if ratio is not None and out_grid is not None:
            raise ValueError(f"give ratio={ratio} or out_grid={out_grid}, not both")
        if ratio is not None and (type(ratio) is not int or ratio < 1 or math.isqrt(ratio) ** 2 != ratio):
            raise ValueError(f"ratio={ratio!r}: expected the square of a whole number (1, 4, 9, 16, ...)")
        if out_grid is not None:
            check_grid("out_grid", out_grid)
        self.in_dim, self.out_dim = in_dim, out_dim
        self.ratio = ratio
        self.fixed_grid = None if out_grid is None else (out_grid[0], out_grid[1])

    @property
    def feature_dim(self) -> int:
        """C, once per level, the width of the features that it is given."""
        return self.in_dim * max(1, len(self.encoder_levels))

    def out_grid(self, grid: Grid) -> Grid:
        """The grid (h, w) of the tokens for features of a grid (H, W); known before any tensor exists.

        Raises:
            ValueError: the projector cannot make this grid.
        """
        check_grid("grid", grid)
        step = math.isqrt(self.ratio or 1)
        h, w = self.fixed_grid or (-(-grid[0] // step), -(-grid[1] // step))
        if h > grid[0] or w > grid[1]:
            raise ValueError(f"out_grid={h}x{w}: expected at most the features' grid {grid[0]}x{grid[1]}")
        return h, w

    def num_tokens(self, grid: Grid) -> int:
        """How many tokens an image of features on ``grid`` becomes, end tokens included.

        Raises:
            ValueError: the projector cannot make this grid.
        """
        h, w = self.out_grid(grid)
        return h * w + self.end_tokens

    def options(self) -> dict[str, Any]:
        """Keyword arguments that build this projector again, beside its widths."""
        return {"ratio": self.ratio, "out_grid": self.fixed_grid}

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """(B, H*W, feature_dim) -> (B, h*w, D), both in raster order, then any end tokens. Never writes to its input.

        Args:
            features: the encoder's features without prefix tokens.
            grid: (H, W); None where the features form a square.

        Raises:
            ValueError: features that do not fill the grid, or of another width.
        """
        grid = self.checked_grid(features, grid)
        return self.project(features, grid, self.out_grid(grid))

    def checked_grid(self, features: Tensor, grid: Grid | None) -> Grid:
        """The grid of ``features``, which are checked; see :meth:`forward`."""
        if features.ndim != 3 or features.shape[2] != self.feature_dim:
            raise ValueError(f"features {tuple(features.shape)}: expected (B, H*W, {self.feature_dim})")
        grid = square_grid(features.shape[1]) if grid is None else grid
        check_grid("grid", grid)
        check_length("features", features.shape[1], "grid", grid)
        return grid

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        """(B, H*W, feature_dim) on ``grid`` -> (B, h*w, D) on ``out_grid``, then any end tokens."""
        raise NotImplementedError
