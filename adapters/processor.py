"""How many placeholders a processor emits for an image, and how to change that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PlaceholderCount:
    """The attributes by which a LLaVA processor counts: ``(height // patch_size) * (width // patch_size) +
    num_additional_image_tokens``, less one with ``vision_feature_select_strategy == "default"``.

    Attributes:
        patch_size: side of a patch in pixels.
        num_additional_image_tokens: beside the patches.
    """

    patch_size: int
    num_additional_image_tokens: int

    @classmethod
    def read(cls, processor: Any) -> PlaceholderCount:
        """What the processor has now.

        Raises:
            ValueError: it does not count like this.
        """
        try:
            return cls(processor.patch_size, processor.num_additional_image_tokens)
        except AttributeError as error:
            raise ValueError(f"{type(processor).__name__} is no LLaVA processor: {error}") from error

    @classmethod
    def for_tokens(cls, tokens: int, processor: Any) -> PlaceholderCount:
        """Makes the processor emit ``tokens`` placeholders for its images, which are all of one size.

        The image counts as a single patch and all other tokens as additional ones: any number can be written so.
        """
        height, width = image_size(processor)
        side = max(height, width)
        dropped = 1 if processor.vision_feature_select_strategy == "default" else 0
        return cls(side, tokens + dropped - (height // side) * (width // side))

    def write(self, processor: Any) -> None:
        """Sets the attributes."""
        processor.patch_size = self.patch_size
        processor.num_additional_image_tokens = self.num_additional_image_tokens


def image_size(processor: Any) -> tuple[int, int]:
    """(height, width) of the images that the processor makes."""
    images = processor.image_processor
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    return size["height"], size["width"]


def count_placeholders(processor: Any) -> int:
    """How many placeholders the processor emits for one image, by processing a black one.

    Raises:
        ValueError: it cannot process an image.
    """
    try:
        image = np.zeros((*image_size(processor), 3), dtype=np.uint8)
        token_id = processor.image_token_id
        (ids,) = processor(text=[processor.image_token], images=[image])["input_ids"]
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{type(processor).__name__} cannot process an image and its placeholder: {error}") from error
    return sum(int(i) == token_id for i in ids)
