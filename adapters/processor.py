"""How many placeholders a processor emits for an image, and how to change that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vision_remember.grid import Grid

_ATTRIBUTES = ("patch_size", "num_additional_image_tokens", "num_image_tokens")


@dataclass(frozen=True)
class PlaceholderCount:
    """The attributes by which a processor of the LLaVA family counts.

    - LLaVA: ``(height // patch_size) * (width // patch_size) + num_additional_image_tokens``, less one with
      ``vision_feature_select_strategy == "default"``;
    - LLaVA-NeXT: the same for each tile, stitched, without padding, and newlines;
    - LLaVA-OneVision: ``num_image_tokens`` for each tile, a square.

    Attributes:
        values: of the attributes that the processor has.
    """

    values: tuple[tuple[str, int], ...]

    @classmethod
    def read(cls, processor: Any) -> PlaceholderCount:
        """What the processor has now.

        Raises:
            ValueError: it does not count like this.
        """
        values = tuple((name, getattr(processor, name)) for name in _ATTRIBUTES if hasattr(processor, name))
        if not values:
            raise ValueError(f"{type(processor).__name__} is no LLaVA processor: it has no {' nor '.join(_ATTRIBUTES)}")
        return cls(values)

    @classmethod
    def for_tokens(cls, processor: Any, tokens: int, token_grid: Grid, patch_size: int | None) -> PlaceholderCount:
        """Makes the processor emit ``tokens`` placeholders for an image or, where it cuts them up, for each tile.

        Args:
            processor: whose count it is.
            tokens: wanted.
            token_grid: (h, w) of them.
            patch_size: of which they would be the patches, in pixels, where images are cut up.
        """
        if hasattr(processor, "num_image_tokens"):
            return cls((("num_image_tokens", token_grid[0] * token_grid[1]),))
        if patch_size is not None:
            return cls((("patch_size", patch_size),))
        # The image counts as a single patch and all other tokens as additional ones: any number can be written so.
        height, width = image_size(processor)
        side = max(height, width)
        dropped = 1 if processor.vision_feature_select_strategy == "default" else 0
        more = tokens + dropped - (height // side) * (width // side)
        return cls((("patch_size", side), ("num_additional_image_tokens", more)))

    def write(self, processor: Any) -> None:
        """Sets the attributes."""
        for name, value in self.values:
            setattr(processor, name, value)


def image_size(processor: Any) -> tuple[int, int]:
    """(height, width) of the images that the processor makes."""
    images = processor.image_processor
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    return size["height"], size["width"]


def tokens_per_tile(processor: Any, side: int | None) -> int:
    """How many placeholders the processor emits for one tile.

    Args:
        processor: to ask.
        side: of a tile in pixels, where images are cut up; None for one image, by processing a black one.

    Raises:
        ValueError: it cannot process an image.
    """
    if side is None:
        return _count_placeholders(processor)
    count: int | None = getattr(processor, "num_image_tokens", None)
    return (side // processor.patch_size) ** 2 if count is None else count


def _count_placeholders(processor: Any) -> int:
    try:
        image = np.zeros((*image_size(processor), 3), dtype=np.uint8)
        token_id = processor.image_token_id
        (ids,) = processor(text=[processor.image_token], images=[image])["input_ids"]
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{type(processor).__name__} cannot process an image and its placeholder: {error}") from error
    return sum(int(i) == token_id for i in ids)
