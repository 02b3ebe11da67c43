"""QueCC: TokenPacker's attention with queries that know the question (arXiv 2411.03312)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from vision_remember.grid import Grid, count_or
from vision_remember.projectors.attention import Attention, mlp, unfused_attention
from vision_remember.projectors.blocks import BlockProjector, Fit, fitted
from vision_remember.projectors.checkpoints import renamed

_NORM_EPS = 1e-6


class QueCC(BlockProjector):
    """Adds the question to every feature, condenses blocks of them into queries, which then read the cells under them.

    A learned depthwise convolution over blocks of ``block`` cells makes the queries; the cells of a token's attention
    and of its block are the same where the grids divide. Meant for few tokens (ratios of 16 and more); at a ratio of 4,
    its authors say, it comes down to TokenPacker. The question's vector is the language model's last hidden state at
    the question's last token; whoever calls the projector has to compute it first.

    Args:
        in_dim: C, width of one level.
        out_dim: D, width of the decoder.
        ratio: features per token; see :class:`Projector`.
        out_grid: (h, w) instead of a ratio.
        text_dim: T, width of the question's vector; None for D.
        block: cells (rows, columns) that the convolution condenses; see :class:`BlockProjector`.
        fit: "error", "pad" or "resize", what the convolution reads on grids that do not divide; see
            :class:`BlockProjector`. The attention takes them by the cell rule of adaptive average pooling.
        num_heads: heads of the attention, which is C wide.

    Raises:
        ValueError: heads that do not divide the width, or an unknown ``fit``.
    """

    encoder_levels: ClassVar[tuple[int, ...]] = (12, 16, 22, 23)
    needs_text: ClassVar[bool] = True

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        ratio: int | None = None,
        out_grid: Grid | None = None,
        text_dim: int | None = None,
        block: Grid | None = None,
        fit: Fit = "error",
        num_heads: int = 8,
    ) -> None:
        super().__init__(in_dim, out_dim, ratio=ratio, out_grid=out_grid, block=block, fit=fit)
        self.text_dim = count_or("text_dim", text_dim, out_dim)
        self.question = nn.Linear(self.text_dim, in_dim)
        self.question_norm = nn.LayerNorm(in_dim, eps=_NORM_EPS)
        self.query = mlp(in_dim, in_dim, in_dim)
        self.query_norm = nn.LayerNorm(in_dim, eps=_NORM_EPS)
        self.condense = nn.Conv2d(in_dim, in_dim, self.block, stride=self.block, groups=in_dim)
        self.key = mlp(self.feature_dim, in_dim, in_dim)
        self.key_norm = nn.LayerNorm(in_dim, eps=_NORM_EPS)
        self.value = mlp(self.feature_dim, in_dim, in_dim)
        self.value_norm = nn.LayerNorm(in_dim, eps=_NORM_EPS)
        self.attention = Attention(in_dim, num_heads)
        self.mlp = mlp(in_dim, out_dim, out_dim)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "text_dim": self.text_dim, "num_heads": self.attention.num_heads}

    def forward(self, features: Tensor, grid: Grid | None = None, *, text: Tensor | None = None) -> Tensor:
        """(B, H*W, feature_dim) and a question to each image -> (B, h*w, D), in raster order.

        Args:
            features: the encoder's features without prefix tokens, all levels joined.
            grid: (H, W); None where the features form a square.
            text: (B, T), the vector of the question.

        Raises:
            ValueError: no text, or features or text of another shape.
        """
        grid = self.checked_grid(features, grid)
        out_grid = self.out_grid(grid)
        if text is None:
            raise ValueError(
                f"QueCC compresses an image for a question: pass text=, (B, {self.text_dim}), the language model's "
                "last hidden state at the question's last token"
            )
        expected = (features.shape[0], self.text_dim)
        if tuple(text.shape) != expected:
            raise ValueError(f"text {tuple(text.shape)}: expected (B, text_dim) = {expected}")
        key, value = self.key_norm(self.key(features)), self.value_norm(self.value(features))
        query = self._queries(features[..., -self.in_dim :], text, grid, out_grid)
        return self.mlp(self.attention(query, key, value, regions=(out_grid, grid)))

    def _queries(self, main: Tensor, text: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        """(B, H*W, C), the last level -> (B, h*w, C)."""
        asked = main + self.question_norm(self.question(text)).unsqueeze(1)
        condensable = self.query_norm(self.query(asked))
        size = (out_grid[0] * self.block[0], out_grid[1] * self.block[1])
        return self.condense(fitted(condensable, grid, size, self.fit)).flatten(2).transpose(1, 2)

    @classmethod
    def import_state_dict(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of QueCC's release under our names.

        Args:
            state_dict: those of its compressor, without a prefix, and of ``mm_projector``, the MLP behind it, with that
                prefix.

        Raises:
            ValueError: a weight of another module, or none of the attention.
        """
        names = {"q_downsample": "condense", "text_projection.0": "question", "text_projection.1": "question_norm"}
        for letter, our in (("q", "query"), ("k", "key"), ("v", "value")):
            names |= {f"{letter}_proj.{i}": f"{our}.{i}" for i in (0, 2)} | {f"{letter}_proj.3": f"{our}_norm"}
        names |= {f"mm_projector.{i}": f"mlp.{i}" for i in (0, 2)}
        rest = {name: weight for name, weight in state_dict.items() if not name.startswith("clip_attn.")}
        return renamed(rest, names) | unfused_attention(state_dict, "clip_attn", "attention")
