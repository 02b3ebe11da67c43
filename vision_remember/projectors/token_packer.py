"""TokenPacker: coarse queries inject the details of their own cells (arXiv 2407.02392)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.grid import Grid, check_count, check_grid, count_or
from vision_remember.projectors.attention import Attention, mlp, unfused_attention
from vision_remember.projectors.base import Projector
from vision_remember.projectors.checkpoints import renamed

_NORM_EPS = 1e-6


class TokenPacker(Projector):
    """Each token, a downsampled feature, attends to the multi-level features of the cells under it.

    The query is the last level, bilinearly downsampled without antialiasing: the mean of 2x2 cells at a ratio of 4, but
    the centre cell alone at 9 and the central 2x2 at 16. Keys and values come from all levels. No position and no
    residual. Where the grids do not divide, a token's cells are those of adaptive average pooling, so any grid works.

    Args:
        in_dim: C, width of one level.
        out_dim: D, width of the decoder.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio.
        hidden_dim: E, width of the attention; None for C.
        num_heads: heads of the attention.

    Raises:
        ValueError: the heads do not divide the width.
    """

    encoder_levels: ClassVar[tuple[int, ...]] = (12, 16, 22, 23)

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        hidden_dim: int | None = None,
        num_heads: int = 8,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid)
        width = count_or("hidden_dim", hidden_dim, in_dim)
        self.hidden_dim = width
        self.query = nn.Linear(in_dim, width, bias=False)
        self.key = mlp(self.feature_dim, width, width)
        self.value = mlp(self.feature_dim, width, width)
        self.query_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.key_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.value_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.attention = Attention(width, num_heads)
        self.mlp = mlp(width, out_dim, out_dim)
        for linear in (self.query, *self.key, *self.value, self.attention.out, *self.mlp):
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "hidden_dim": self.hidden_dim, "num_heads": self.attention.num_heads}

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        main = features[..., -self.in_dim :].transpose(1, 2).unflatten(2, grid)  # (B, C, H, W)
        coarse = F.interpolate(main, size=out_grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        query = self.query_norm(self.query(coarse))
        key, value = self.key_norm(self.key(features)), self.value_norm(self.value(features))
        return self.mlp(self.attention(query, key, value, regions=(out_grid, grid)))

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of TokenPacker's own release, under our names.

        Args:
            state_dict: the projector's part of a checkpoint, without the prefix of the model around it.

        Raises:
            ValueError: a weight of another module, or none of the attention.
        """
        names = {f"{x}_proj_1.{i}": f"{our}.{i}" for x, our in (("k", "key"), ("v", "value")) for i in (0, 2)}
        names |= {f"ln_{our[0]}_1": f"{our}_norm" for our in ("query", "key", "value")}
        names |= {"q_proj_1": "query", "mlp.0": "mlp.0", "mlp.2": "mlp.2"}
        rest = {name: weight for name, weight in state_dict.items() if not name.startswith("clip_attn.")}
        return renamed(rest, names) | unfused_attention(state_dict, "clip_attn", "attention")


def hd_layout(image_size: Grid, *, max_tiles: int = 9, tile: int = 336) -> Grid:
    """The rows and columns of tiles that TokenPacker-HD cuts an image into.

    Of all layouts of at most ``max_tiles`` tiles it takes the one whose canvas the image fills best when scaled to fit,
    with a small bonus for a canvas about 1.4 times as large as the image: ``filled share + 0.1 * IoU(canvas, 1.4 *
    image)``. With 9 tiles these are the release's own 23 layouts; for larger numbers it leaves some out, we do not.

    Args:
        image_size: (height, width) in pixels.
        max_tiles: the most tiles.
        tile: side of a tile in pixels.

    Raises:
        ValueError: a size or number that is not positive.
    """
    check_grid("image_size", image_size)
    check_count("max_tiles", max_tiles)
    check_count("tile", tile)
    height, width = image_size

    def merit(layout: Grid) -> float:
        canvas = layout[0] * tile, layout[1] * tile
        scale = min(canvas[0] / height, canvas[1] / width)
        filled = round(height * scale) * round(width * scale) / math.prod(canvas)
        wanted = 1.4 * height, 1.4 * width
        shared = min(canvas[0], wanted[0]) * min(canvas[1], wanted[1])
        return filled + 0.1 * shared / (math.prod(canvas) + math.prod(wanted) - shared)

    layouts = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]
    return max(layouts, key=merit)


def hd_token_count(layout: Grid, tokens: int) -> int:
    """Sequence positions of a tiled image: its tiles, separators between columns, a line end per row, a thumbnail.

    Args:
        layout: (rows, columns) of tiles; a single tile has no thumbnail.
        tokens: tokens of one tile.
    """
    rows, columns = layout
    thumbnail = tokens + 1 if rows * columns > 1 else 0
    return rows * columns * tokens + rows * (columns - 1) + rows + thumbnail
