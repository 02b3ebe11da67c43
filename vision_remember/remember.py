"""The block: vision tokens are normalised, re-read the features, and the update is added (Vision Remember, eq. 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vision_remember.config import VisionRememberConfig
from vision_remember.grid import Grid
from vision_remember.interactions import build_interaction, interaction_options

_NORM_EPS = 1e-6


class VisionRemember(nn.Module):
    """Norm, interaction, residual, for the vision tokens in front of one decoder layer.

    The block computes in the dtype of its own weights, so that float32 blocks can train inside a bfloat16 decoder.

    Args:
        query_dim: D, width of the decoder.
        feature_dim: C, width of the features, all levels joined.
        interaction: an entry of ``INTERACTIONS``.
        **options: options of the interaction.

    Raises:
        ValueError: an unknown interaction or option.
    """

    # The two names by which transformers switches activation checkpointing of any module on and off.
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, query_dim: int, feature_dim: int, *, interaction: str = "sela", **options: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(query_dim, eps=_NORM_EPS)
        self.interaction = build_interaction(interaction, query_dim, feature_dim, **options)

    @classmethod
    def from_config(
        cls, config: VisionRememberConfig, query_dim: int, feature_dim: int, *, num_levels: int = 1
    ) -> VisionRemember:
        """The block that a configuration describes.

        Raises:
            ValueError: the configuration sets something that its interaction does not have.
        """
        options = config.interaction_options(interaction_options(config.interaction))
        return cls(query_dim, feature_dim, interaction=config.interaction, num_levels=num_levels, **options)

    def prepare(self, features: Tensor, *, feature_grid: Grid, saliency: Tensor | None = None) -> Any:
        """The part of the work that needs the image alone; give the result to :meth:`forward` as ``features``."""
        features, saliency = self._cast(features), None if saliency is None else self._cast(saliency)
        return self.interaction.prepare(features, feature_grid=feature_grid, saliency=saliency)

    def forward(
        self,
        tokens: Tensor,
        features: Any,
        *,
        token_grid: Grid,
        feature_grid: Grid,
        saliency: Tensor | None = None,
    ) -> Tensor:
        """Tokens that have re-read the features under them.

        Args:
            tokens: (B, h*w, D), the vision tokens of the residual stream, raster order.
            features: (B, H*W, C), raster order, the levels joined on channels; or what :meth:`prepare` returned.
            token_grid: (h, w).
            feature_grid: (H, W).
            saliency: (B, H*W), or None.

        Returns:
            (B, h*w, D), in the dtype of ``tokens``, residual included.

        Raises:
            ValueError: shapes and grids that do not fit together.
        """
        arguments = (tokens, features, token_grid, feature_grid, saliency)
        if self.gradient_checkpointing and self.training:
            # Positional: a re-entrant checkpoint passes gradients through positional tensors only.
            return self._gradient_checkpointing_func(self._remember, *arguments)
        return self._remember(*arguments)

    def _remember(
        self, tokens: Tensor, features: Any, token_grid: Grid, feature_grid: Grid, saliency: Tensor | None
    ) -> Tensor:
        update = self.interaction(
            self.norm(self._cast(tokens)),
            self._cast(features) if isinstance(features, Tensor) else features,
            token_grid=token_grid,
            feature_grid=feature_grid,
            saliency=None if saliency is None else self._cast(saliency),
        )
        return tokens + update.to(tokens.dtype)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.norm.weight.dtype)
