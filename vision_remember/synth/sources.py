"""Real material: photographs, handwriting and tables that scikit-image, scikit-learn and matplotlib bring along.

Nothing is downloaded. The libraries are imported when a page needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# whole photographs are held out, not crops of them
PHOTOS = {
    "train": ("astronaut", "chelsea", "china.jpg", "hubble_deep_field"),
    "test": ("coffee", "flower.jpg", "rocket"),
}
TABLES = ("load_iris", "load_wine", "load_breast_cancer", "load_diabetes", "load_linnerud")


@contextmanager
def needed() -> Iterator[None]:
    """Around the import of an optional library: says which extra brings it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"vision_remember.synth cannot import what it renders with ({error}): pip install 'vision-remember[synth]'"
        ) from error


@cache
def photo(name: str) -> NDArray[np.uint8]:
    """A photograph, (H, W, 3); names that end in .jpg are scikit-learn's, the others scikit-image's."""
    with needed():
        from skimage import data
        from sklearn import datasets
    if name.endswith(".jpg"):
        return np.asarray(datasets.load_sample_image(name), np.uint8)
    return np.asarray(getattr(data, name)(), np.uint8)


@cache
def _reduced(name: str, size: int) -> NDArray[np.uint8]:
    """The photograph with its shorter side near 1.5 ``size``, or larger where it cannot shrink by a whole factor."""
    pixels = photo(name)
    factor = max(1, int(min(pixels.shape[:2]) / (1.5 * size)))
    height, width = (side // factor for side in pixels.shape[:2])
    blocks = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    reduced = blocks.mean((1, 3)).round().astype(np.uint8)
    margins = [(0, max(0, size - side)) for side in (height, width)]
    return np.pad(reduced, [*margins, (0, 0)], mode="symmetric")


def places(name: str, size: int) -> tuple[int, int]:
    """How many rows and columns the top left corner of a crop of ``size`` x ``size`` pixels can stand on."""
    height, width = _reduced(name, size).shape[:2]
    return height - size + 1, width - size + 1


def crop(name: str, top: int, left: int, size: int) -> NDArray[np.uint8]:
    """(size, size, 3) of a photograph."""
    return _reduced(name, size)[top : top + size, left : left + size]


@cache
def handwriting(split: str, digit: int, height: int, width: int) -> NDArray[np.uint8]:
    """Handwritten digits as coverage in 0..255, (samples, height, width); the two splits share no sample."""
    with needed():
        from PIL import Image
        from sklearn.datasets import load_digits
    digits = load_digits()
    samples = digits.images[digits.target == digit][int(split == "test") :: 2]
    ink = (samples.clip(0, 16) * (255 / 16)).astype(np.uint8)
    scaled = [Image.fromarray(one).resize((width, height), Image.Resampling.BOX) for one in ink]
    return np.stack([np.asarray(one, np.uint8) for one in scaled])


@cache
def table_columns() -> tuple[tuple[float, ...], ...]:
    """The columns of real tables, each scaled to 0..1 between its smallest and largest value."""
    with needed():
        from sklearn import datasets
    columns = []
    for name in TABLES:
        options = {"scaled": False} if name == "load_diabetes" else {}
        values = np.asarray(getattr(datasets, name)(**options).data, np.float64)
        for column in values.T:
            low, high = float(column.min()), float(column.max())
            columns.append(tuple(round((float(value) - low) / (high - low), 4) for value in column))
    return tuple(columns)


@cache
def font(name: str, size: int) -> Any:
    """A typeface that matplotlib brings along."""
    with needed():
        import matplotlib
        from PIL import ImageFont
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)
