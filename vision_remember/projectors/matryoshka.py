"""M3: one set of weights for many nested token counts, chosen at every call (arXiv 2405.17430)."""

from __future__ import annotations

import math

from torch import Tensor

from vision_remember.grid import Grid, check_count, check_grid
from vision_remember.projectors.adaptive_avg_pool import average_pooled
from vision_remember.projectors.mlp import MLPProjector


def nested_grids(grid: Grid) -> dict[int, Grid]:
    """Grids that equal square blocks of ``grid``'s cells make, by their number of tokens: each pools into the next.

    24x24 makes 576, 144, 64, 36, 16, 9, 4 and 1 tokens; 24x36 makes 864, 216, 96, 54, 24 and 6.
    """
    common = math.gcd(*grid)
    sides = [side for side in range(1, common + 1) if common % side == 0]
    return {grid[0] * grid[1] // side**2: (grid[0] // side, grid[1] // side) for side in sides}


class Matryoshka(MLPProjector):
    """LLaVA's MLP on every feature, then the mean of the tokens of each block: (B, H*W, C) -> (B, h*w, D).

    No weight depends on the number of tokens. Training draws a budget per step, or runs one forward per budget and
    averages their losses; whoever sets a budget also writes as many image placeholders into the prompt. M3 itself uses
    1, 9, 36, 144 and 576 tokens of 24x24 features. A ratio or ``out_grid`` that does not divide the features' grid
    pools by adaptive average pooling's cells, which do not nest.

    The arguments are those of :class:`MLPProjector`; ratio and ``out_grid`` say what it makes without a budget.

    Attributes:
        budget: tokens per image in place of the ratio's; None without one. A state of the run, not of the weights: it
            is not part of :meth:`options`.
    """

    budget: int | None = None

    def set_budget(self, tokens: int | None) -> None:
        """Makes every later call emit this many tokens; None goes back to the ratio or grid of the construction.

        In a model, set it through the handle of :func:`vision_remember.compress_projector`, which tells the processor.

        Raises:
            ValueError: no positive integer. Whether the features nest into it is known, and said, by :meth:`out_grid`.
        """
        if tokens is not None:
            check_count("tokens", tokens)
        self.budget = tokens

    def out_grid(self, grid: Grid) -> Grid:
        if self.budget is None:
            return super().out_grid(grid)
        check_grid("grid", grid)
        grids = nested_grids(grid)
        if self.budget not in grids:
            budgets = ", ".join(map(str, sorted(grids)))
            raise ValueError(f"budget={self.budget}: features on a grid of {grid[0]}x{grid[1]} nest into {budgets}")
        return grids[self.budget]

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        return average_pooled(self.mlp(features), grid, out_grid)
