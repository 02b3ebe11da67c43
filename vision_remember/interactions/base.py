"""What every interaction is: tokens read features, and an update for the tokens comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar, cast

from torch import Tensor, nn

from vision_remember.grid import Grid, check_grid, check_length
from vision_remember.interactions.levels import Features, are_features

P = TypeVar("P")


def check_tokens(tokens: Tensor, width: int) -> None:
    """Raises ValueError unless ``tokens`` are (B, h*w, width)."""
    if tokens.ndim != 3 or tokens.shape[2] != width:
        raise ValueError(f"tokens {tuple(tokens.shape)}: expected (B, h*w, {width}), query_dim={width}")


def check_prepared(tokens: Tensor, held: Tensor, images: int, **grids: tuple[Grid, Grid]) -> None:
    """Raises ValueError unless these tokens can read images that were prepared before.

    Args:
        tokens: (B, h*w, D).
        held: one of the tensors that were prepared.
        images: how many of them.
        **grids: by name, the grid that they were prepared for, and the one that is given now.
    """
    for name, (prepared_for, given) in grids.items():
        if prepared_for != tuple(given):
            raise ValueError(f"this image was prepared for {name}={prepared_for}, not for {given}")
    if images != tokens.shape[0]:
        raise ValueError(f"{tokens.shape[0]} token grids, but {images} prepared images")
    if held.device != tokens.device:
        raise ValueError(f"devices differ: tokens {tokens.device}, features {held.device}")


class Interaction(nn.Module, Generic[P]):
    """Base of all interactions.

    A subclass implements :meth:`project`, which holds all work that depends on the image alone, and :meth:`attend`.

    Args:
        query_dim: D, width of the tokens.
        feature_dim: C, width of the features, all levels joined.
        level_dims: c of each level; None for a single one.

    Attributes:
        local: whether a token's place decides what it reads.
        reads_tokens: whether what a token holds decides what it gets.
    """

    local: ClassVar[bool] = True
    reads_tokens: ClassVar[bool] = True

    def __init__(self, query_dim: int, feature_dim: int, level_dims: Sequence[int] | None = None) -> None:
        super().__init__()
        self.query_dim = query_dim
        self.feature_dim = feature_dim
        self.level_dims = tuple(level_dims or (feature_dim,))

    def prepare(
        self,
        features: Features,
        *,
        feature_grid: Grid,
        saliency: Tensor | None = None,
        token_grid: Grid | None = None,
    ) -> P:
        """What the layer needs of an image, once per image, whatever the tokens.

        Args:
            features: (B, H*W, C), raster order, the levels joined on channels; or one (B, H*W, c) per level.
            feature_grid: (H, W).
            saliency: (B, H*W), or None for no saliency.
            token_grid: (h, w) of the tokens to come, where that is known: what is prepared then fits these alone, and
                may stand in an order of theirs, which saves copies later.

        Raises:
            ValueError: shapes and grids that do not fit together.
        """
        if not isinstance(features, Tensor) and len(features) == 1:
            features = features[0]
        first = features if isinstance(features, Tensor) else self._checked_levels(features)[0]
        if isinstance(features, Tensor) and (features.ndim != 3 or features.shape[2] != self.feature_dim):
            expected = f"(B, H*W, {self.feature_dim}), feature_dim={self.feature_dim}"
            raise ValueError(f"features {tuple(features.shape)}: expected {expected}")
        check_grid("feature_grid", feature_grid)
        check_length("features", first.shape[1], "feature_grid", feature_grid)
        if saliency is not None and saliency.shape != first.shape[:2]:
            raise ValueError(f"saliency {tuple(saliency.shape)}: expected (B, H*W) = {tuple(first.shape[:2])}")
        if token_grid is not None:
            check_grid("token_grid", token_grid)
        return self.project(features, saliency, feature_grid=feature_grid, token_grid=token_grid)

    def _checked_levels(self, levels: Sequence[Tensor]) -> Sequence[Tensor]:
        widths = tuple(level.shape[-1] for level in levels)
        # Sizes are compared, not collected in a set: those that torch.export leaves open have no hash.
        alike = all(level.ndim == 3 and level.shape[:2] == levels[0].shape[:2] for level in levels)
        if widths != self.level_dims or not alike:
            found = ", ".join(str(tuple(level.shape)) for level in levels)
            raise ValueError(
                f"features [{found}]: expected one (B, H*W, c) per level, level_dims={list(self.level_dims)}"
            )
        return levels

    def project(self, features: Features, saliency: Tensor | None, *, feature_grid: Grid, token_grid: Grid | None) -> P:
        """:meth:`prepare` after its checks."""
        raise NotImplementedError

    def attend(self, tokens: Tensor, prepared: P, *, token_grid: Grid, feature_grid: Grid) -> Tensor:
        """(B, h*w, D) tokens and a prepared image -> (B, h*w, D) update."""
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        features: Features | P,
        *,
        token_grid: Grid,
        feature_grid: Grid,
        saliency: Tensor | None = None,
    ) -> Tensor:
        """The update of each token, without the residual.

        Args:
            tokens: (B, h*w, D), raster order.
            features: (B, H*W, C), raster order, the levels joined on channels; or a list of (B, H*W, c), one per level,
                which is the same without a copy of them all; or what :meth:`prepare` returned.
            token_grid: (h, w).
            feature_grid: (H, W).
            saliency: (B, H*W); belongs to :meth:`prepare` if that was called.

        Returns:
            (B, h*w, D).

        Raises:
            ValueError: shapes and grids that do not fit together.
        """
        check_tokens(tokens, self.query_dim)
        check_grid("token_grid", token_grid)
        check_length("tokens", tokens.shape[1], "token_grid", token_grid)
        if are_features(features):
            # Not by len() of a tensor, which torch.export takes for a constant.
            levels = [features] if isinstance(features, Tensor) else features
            images = levels[0].shape[0] if levels else 0
            if images != tokens.shape[0]:
                raise ValueError(f"{tokens.shape[0]} token grids, but features of {images} images")
            features = self.prepare(features, feature_grid=feature_grid, saliency=saliency, token_grid=token_grid)
        elif saliency is not None:
            raise ValueError("saliency was given beside prepared features; give it to prepare() instead")
        return self.attend(tokens, cast(P, features), token_grid=token_grid, feature_grid=feature_grid)
