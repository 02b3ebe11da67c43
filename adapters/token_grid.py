"""Hosts that lay tokens out by the patch size, told the one that the tokens of a swapped projector have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vision_remember.adapters.interception import MethodInterception
from vision_remember.grid import Grid

_SLOT = "_vision_remember_patch_size"

LAYOUTS = MethodInterception(_SLOT, ("pack_image_features", "apply_pooling"))
"""The methods of hosts that read the configuration for the grid of a tile's tokens."""


class PatchSize:
    """The patch size, in pixels, of which a tile's tokens would be the patches.

    The configuration itself stays as it is: it is saved with the model.

    Args:
        base: the host's module.
        token_grid: (h, w) of a tile's tokens.

    Attributes:
        side: of a tile in pixels.
        pixels: the patch size.

    Raises:
        ValueError: not square, or no patch size has this many patches on a side.
    """

    def __init__(self, base: nn.Module, token_grid: Grid) -> None:
        rows, columns = token_grid
        side = tile_side(base)
        if rows != columns or side // (side // rows) != rows:
            raise ValueError(
                f"out_grid={rows}x{columns}: {type(base).__name__} lays out square tiles of {side} pixels; no "
                "patch size has so many patches on a side"
            )
        self.base, self.side, self.pixels = base, side, side // rows

    @classmethod
    def needed(cls, base: nn.Module) -> bool:
        """Whether a host lays out tokens by the patch size."""
        return callable(getattr(type(base), "pack_image_features", None))

    def install(self) -> None:
        """From now on the host lays out its tokens by this patch size."""
        LAYOUTS.add(self.base)
        setattr(self.base, _SLOT, self)

    def uninstall(self) -> None:
        """The inverse of :meth:`install`; nothing happens if that was not called."""
        LAYOUTS.release(self.base)
        self.base.__dict__.pop(_SLOT, None)

    def __call__(self, base: Any, method: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        """The host's method, run on the host with this patch size."""
        vision = _With(base.config.vision_config, patch_size=self.pixels)
        return method(_With(base, config=_With(base.config, vision_config=vision)), *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled host is one more instance, perhaps in a process that swapped nothing.
        self.__dict__.update(state)
        LAYOUTS.add(self.base)


def tile_side(base: nn.Module) -> int:
    """Pixels on a side of a tile."""
    config: Any = base.config
    return int(config.vision_config.image_size)


class _With:
    """Looks like an object, but for some attributes."""

    def __init__(self, of: Any, **attributes: Any) -> None:
        self._of = of
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of"], name)
