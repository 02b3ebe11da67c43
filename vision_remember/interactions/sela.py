"""SELA, saliency-enhancing local attention: each token re-reads the cells under it (Vision Remember, section 4.3)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.grid import Grid
from vision_remember.interactions.base import Interaction
from vision_remember.ops import local_attention, region_bias

Position = Literal["specialised", "learned", "none"]
FeatureNorm = Literal["per_level", "joint", "none"]

# A head that starts on its own cell of a 2x2 region gives it e^3 / (e^3 + 3) = 87 % of its weight.
_OWN_CELL_LOGIT = 3.0
_LEARNED_STD = 0.02
_MAX_DEFAULT_WIDTH = 1024


class PreparedCells(NamedTuple):
    """Keys and values of an image.

    Attributes:
        key: (B, heads, H*W, d).
        value: (B, heads, H*W, d), saliency already multiplied in.
    """

    key: Tensor
    value: Tensor


class SELA(Interaction[PreparedCells]):
    """Cross-attention from each token to the features of the cells under it, values weighted by saliency.

    Args:
        query_dim: D, width of the tokens.
        feature_dim: C, width of the features, all levels joined.
        attn_dim: width of the attention; "features" for C; None for D, at most 1024.
        num_heads: heads; None for heads of 64 channels (16 where the attention is narrower than 512).
        window: side k of the block of tokens that share a region; 1 gives every token its own.
        position: a learned bias per head for the place of a cell inside the region. "specialised" starts each head on
            a cell of its own: a start without a preference averages the region and was seen to stay there. "learned"
            starts near zero. "none" is the paper's text, which mentions no bias.
        cells: cells per token (rows, columns) that the position table is laid out for; other regions interpolate it.
            "specialised" needs at least rows * columns heads to cover each cell.
        num_levels: encoder levels joined in the features, for ``feature_norm``.
        feature_norm: layer norm over each level's channels, over all channels ("joint"), or none. It has no weights of
            its own: the projections that follow would absorb them.
        query_layers: 1 for a linear query projection, 2 for an MLP with GELU.
        output_layers: the same for the output projection.
        zero_init: start the last output layer at zero, so that the update is exactly zero.
        backend: back-end of :func:`vision_remember.local_attention`.

    Raises:
        ValueError: a width that the heads do not divide, or an unknown option.
    """

    def __init__(
        self,
        query_dim: int,
        feature_dim: int,
        *,
        attn_dim: int | Literal["features"] | None = None,
        num_heads: int | None = None,
        window: int = 1,
        position: Position = "specialised",
        cells: Grid = (2, 2),
        num_levels: int = 1,
        feature_norm: FeatureNorm = "per_level",
        query_layers: Literal[1, 2] = 1,
        output_layers: Literal[1, 2] = 1,
        zero_init: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(query_dim, feature_dim)
        width = feature_dim if attn_dim == "features" else attn_dim or min(query_dim, _MAX_DEFAULT_WIDTH)
        self.num_heads = num_heads or _default_heads(width)
        if width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide the attention width {width}")
        if feature_dim % num_levels:
            raise ValueError(f"num_levels={num_levels} must divide feature_dim={feature_dim}")
        if window < 1:
            raise ValueError(f"window={window}: expected a positive number of tokens per block side")
        if feature_norm not in ("per_level", "joint", "none"):
            raise ValueError(f"feature_norm={feature_norm!r}: expected 'per_level', 'joint' or 'none'")
        self.attn_dim = width
        self.window = window
        self.norm_groups = {"per_level": num_levels, "joint": 1, "none": 0}[feature_norm]
        self.backend = backend

        # Names that no usual LoRA target matches as a suffix. No bias on keys (it cancels in the softmax) nor on values
        # (the output's bias does the same): saliency before or after the projection is then one and the same.
        self.vr_query = _projection(query_dim, width, query_layers)
        self.vr_key = nn.Linear(feature_dim, width, bias=False)
        self.vr_value = nn.Linear(feature_dim, width, bias=False)
        self.vr_out = _projection(width, query_dim, output_layers)
        self.position = _position_table(position, self.num_heads, window, cells)
        if zero_init:
            for parameter in list(self.vr_out.parameters())[-2:]:  # weight and bias of the last layer
                nn.init.zeros_(parameter)

    def prepare(self, features: Tensor, *, feature_grid: Grid, saliency: Tensor | None = None) -> PreparedCells:
        """Keys and values of the cells; see :meth:`Interaction.prepare`."""
        features = self._normalised(features)
        key, value = self._heads(self.vr_key(features)), self.vr_value(features)
        if saliency is not None:
            value = value * saliency[..., None].to(value.dtype)
        return PreparedCells(key, self._heads(value))

    def attend(self, tokens: Tensor, prepared: PreparedCells, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """Softmax over the cells under each token; see :meth:`Interaction.attend`."""
        query = self._heads(self.vr_query(tokens))
        bias = self._bias(token_grid, feature_grid)
        read = local_attention(
            query,
            prepared.key,
            prepared.value,
            query_grid=token_grid,
            key_grid=feature_grid,
            window=self.window,
            bias=None if bias is None else bias.to(query.dtype),
            backend=self.backend,
        )
        return self.vr_out(read.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def attention_weights(self, tokens: Tensor, features: Tensor, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """Where each token looks, for pictures.

        Args:
            tokens: (B, h*w, D), normalised as the block does it.
            features: (B, H*W, C).
            token_grid: (h, w).
            feature_grid: (H, W).

        Returns:
            (B, heads, h*w, H*W), rows sum to 1; zero outside a token's region.
        """
        self._check_features(features, feature_grid, None)
        query, key = self._heads(self.vr_query(tokens)), self.prepare(features, feature_grid=feature_grid).key
        bias = self._bias(token_grid, feature_grid)
        # Attention over one-hot values is the attention map.
        one_hot = torch.eye(key.shape[2], dtype=query.dtype, device=query.device).expand(*key.shape[:2], -1, -1)
        return local_attention(
            query, key, one_hot, query_grid=token_grid, key_grid=feature_grid, window=self.window, bias=bias
        )

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, width={self.attn_dim}, window={self.window}, backend={self.backend!r}"

    def _normalised(self, features: Tensor) -> Tensor:
        if not self.norm_groups:
            return features
        width = self.feature_dim // self.norm_groups
        return F.layer_norm(features.unflatten(-1, (self.norm_groups, width)), (width,)).flatten(-2)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.num_heads, self.attn_dim // self.num_heads)).transpose(1, 2)

    def _bias(self, token_grid: Grid, feature_grid: Grid) -> Tensor | None:
        if self.position is None:
            return None
        return region_bias(self.position, query_grid=token_grid, key_grid=feature_grid, window=self.window)


def _default_heads(width: int) -> int:
    """As many heads as leave at least 64 (or, in a narrow attention, 16) channels each and divide the width."""
    heads = max(1, width // (64 if width >= 512 else 16))
    while width % heads:
        heads -= 1
    return heads


def _projection(in_dim: int, out_dim: int, layers: int) -> nn.Linear | nn.Sequential:
    if layers == 1:
        return nn.Linear(in_dim, out_dim)
    if layers == 2:
        return nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
    raise ValueError(f"{layers} layers in a projection: expected 1 or 2")


def _position_table(position: Position, heads: int, window: int, cells: Grid) -> nn.Parameter | None:
    """(heads, k*k, k*rows, k*columns), one entry per head, query of the block and cell of its region."""
    if position == "none":
        return None
    rows, columns = cells
    table = torch.zeros(heads, window * window, window * rows, window * columns)
    if position == "learned":
        nn.init.normal_(table, std=_LEARNED_STD)
    elif position == "specialised":
        for head in range(heads):
            row, column = divmod(head % math.prod(cells), columns)
            for query in range(window * window):
                i, j = divmod(query, window)
                table[head, query, i * rows + row, j * columns + column] = _OWN_CELL_LOGIT
    else:
        raise ValueError(f"position={position!r}: expected 'specialised', 'learned' or 'none'")
    return nn.Parameter(table)
