"""Pixel shuffle: the cells of a block side by side on channels (InternVL, arXiv 2404.16821; Idefics3, 2408.12637)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from vision_remember.grid import Grid
from vision_remember.projectors.blocks import BlockProjector, Fit, Order
from vision_remember.projectors.checkpoints import renamed


class PixelShuffle(BlockProjector):
    """Joins the features of each block on channels, losing none, then maps them to the decoder's width.

    With the head "mlp" (LayerNorm, Linear, GELU, Linear) and 2x2 blocks it is InternVL's projector, with "linear" (one
    Linear without bias) that of Idefics3 and SmolVLM, except that these read the encoder's last layer and take square
    images only. Layers are named as in transformers. InternVL's first generation emits the tokens column by column;
    they come row by row here.

    Args:
        in_dim: C, width of the encoder's features.
        out_dim: D, width of the decoder.
        ratio: features per token, s^2; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio.
        block: cells (rows, columns) per token; see :class:`BlockProjector`.
        fit: "error", "pad" or "resize", for grids that do not divide; see :class:`BlockProjector`.
        order: how a block's features lie on channels: "block_major", cell after cell (InternVL, Idefics3, SmolVLM,
            Llama 4, LFM2-VL), or "channel_major", as ``torch.pixel_unshuffle`` has it (Mistral 3).
        head: "mlp" or "linear".

    Raises:
        ValueError: an unknown order, head or fit.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        block: Grid | None = None,
        fit: Fit = "error",
        order: Order = "block_major",
        head: Literal["mlp", "linear"] = "mlp",
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid, block=block, fit=fit)
        if order not in ("block_major", "channel_major"):
            raise ValueError(f"order={order!r}: expected 'block_major' or 'channel_major'")
        if head not in ("mlp", "linear"):
            raise ValueError(f"head={head!r}: expected 'mlp' or 'linear'")
        self.order: Order = order
        self.head: Literal["mlp", "linear"] = head
        joined_dim = self.block[0] * self.block[1] * in_dim
        if head == "mlp":
            self.layer_norm = nn.LayerNorm(joined_dim)
            self.linear_1 = nn.Linear(joined_dim, out_dim)
            self.act = nn.GELU()
            self.linear_2 = nn.Linear(out_dim, out_dim)
        else:
            self.proj = nn.Linear(joined_dim, out_dim, bias=False)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "order": self.order, "head": self.head}

    def project(self, features: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        blocks = self.joined(features, grid, out_grid, self.order)
        if self.head == "linear":
            return self.proj(blocks)
        return self.linear_2(self.act(self.linear_1(self.layer_norm(blocks))))

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a release under our names.

        Args:
            state_dict: InternVL's original ``mlp1``, or Idefics3's or SmolVLM's ``connector``, without that prefix.
                The ``multi_modal_projector`` of InternVL in transformers loads as it is.

        Raises:
            ValueError: a weight of another module.
        """
        names = {"0": "layer_norm", "1": "linear_1", "3": "linear_2", "modality_projection.proj": "proj"}
        return renamed(state_dict, names)
