"""Renders the demo's pages: small text, a bar chart and a few shapes, with the truth of every element.

A page is 96 x 96 pixels, 12 x 12 patches of 8 pixels. The upper half holds 6 lines of 12 letters, one letter per
patch, so that 2 x 2 pooling mixes four letters. The lower left holds six bars, one patch wide. The lower right holds a
3 x 3 board with four shapes, each as large as a pooled cell: what pooling must not hurt.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PATCH = 8
GRID = 12
SIZE = PATCH * GRID
TEXT_ROWS, TEXT_COLUMNS = 6, 12
LETTERS = tuple("ABCDEFGHJKLMNPRSTUXZ")
BARS, BAR_HEIGHTS, BAR_UNIT = 6, 12, 4
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (205, 45, 45),
    "green": (40, 150, 65),
    "blue": (45, 85, 205),
    "orange": (235, 140, 30),
    "purple": (135, 55, 165),
    "teal": (25, 160, 165),
}
BOARD = 3
PLACES = tuple(f"{row}-{column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
TINTS = {"white": (252, 252, 252), "cream": (252, 242, 212), "mint": (218, 245, 226), "rose": (250, 224, 226)}
INKS = {"black": (15, 15, 15), "navy": (15, 25, 115), "maroon": (120, 15, 30)}
BAR_COLOUR = (85, 105, 125)
NOISE = 0.04


@dataclass(frozen=True)
class Pages:
    """A batch of N rendered pages; every label is an index into the tuples above.

    Attributes:
        pixels: (N, 3, 96, 96), uint8.
        letters: (N, 6, 12), which letter stands at each row and column.
        heights: (N, 6), bar heights minus one, in 0..11.
        shape_colours: (N, 4), the colour of the circle, square, triangle and cross.
        shape_places: (N, 4), where each of them lies on the board, raster order.
        tints: (N,), the page's tint.
        inks: (N,), the letters' colour.
    """

    pixels: Tensor
    letters: Tensor
    heights: Tensor
    shape_colours: Tensor
    shape_places: Tensor
    tints: Tensor
    inks: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor | slice) -> Pages:
        return Pages(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def pixel_values(self) -> Tensor:
        """Pixels as the vision tower wants them: (N, 3, 96, 96), float in -1..1."""
        return self.pixels.float() / 127.5 - 1.0

    def image(self, index: int) -> Image.Image:
        """One page as an RGB image."""
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())


def _glyphs() -> np.ndarray:
    """Coverage of each letter in its patch, (20, 8, 8) in 0..1; a free row and column leave room for the shift."""
    font = ImageFont.load_default(size=9)
    glyphs = np.zeros((len(LETTERS), PATCH, PATCH), np.float32)
    for index, letter in enumerate(LETTERS):
        left, top, right, bottom = font.getbbox(letter)
        large = Image.new("L", (int(right - left), int(bottom - top)))
        ImageDraw.Draw(large).text((-left, -top), letter, fill=255, font=font)
        glyph = large.resize((PATCH - 1, PATCH - 1), Image.Resampling.BILINEAR)
        glyphs[index, :-1, :-1] = np.asarray(glyph, np.float32) / 255
    return glyphs


def _shape_masks() -> np.ndarray:
    """Coverage of each shape in its board cell, (4, 16, 16) in {0, 1}."""
    cell = 2 * PATCH
    masks = np.zeros((len(SHAPES), cell, cell), np.float32)
    for index, shape in enumerate(SHAPES):
        image = Image.new("L", (cell, cell))
        draw = ImageDraw.Draw(image)
        if shape == "circle":
            draw.ellipse((2, 2, 13, 13), fill=255)
        elif shape == "square":
            draw.rectangle((2, 2, 13, 13), fill=255)
        elif shape == "triangle":
            draw.polygon(((8, 1), (14, 14), (1, 14)), fill=255)
        else:
            draw.rectangle((6, 1, 9, 14), fill=255)
            draw.rectangle((1, 6, 14, 9), fill=255)
        masks[index] = np.asarray(image, np.float32) / 255
    return masks


def _palette(colours: dict[str, tuple[int, int, int]]) -> np.ndarray:
    return np.asarray(list(colours.values()), np.float32) / 255


def render_pages(count: int, seed: int) -> Pages:
    """Renders `count` random pages; equal seeds give equal pages."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(len(LETTERS), size=(count, TEXT_ROWS, TEXT_COLUMNS))
    heights = rng.integers(BAR_HEIGHTS, size=(count, BARS))
    shape_colours = rng.integers(len(COLOURS), size=(count, len(SHAPES)))
    shape_places = rng.permuted(np.tile(np.arange(BOARD**2), (count, 1)), axis=1)[:, : len(SHAPES)]
    tints = rng.integers(len(TINTS), size=count)
    inks = rng.integers(len(INKS), size=count)
    shifts = rng.integers(2, size=(count, 2))

    canvas = np.empty((count, SIZE, SIZE, 3), np.float32)
    canvas[:] = _palette(TINTS)[tints][:, None, None]

    text_height = TEXT_ROWS * PATCH
    coverage = _glyphs()[letters].transpose(0, 1, 3, 2, 4).reshape(count, text_height, SIZE)
    coverage = np.stack([np.roll(page, shift, axis=(0, 1)) for page, shift in zip(coverage, shifts, strict=True)])
    text = canvas[:, :text_height]
    text += coverage[..., None] * (_palette(INKS)[inks][:, None, None] - text)

    half = SIZE // 2
    level = np.arange(half)[::-1] // BAR_UNIT
    filled = level[None, :, None] <= np.repeat(heights, PATCH, axis=1)[:, None, :]
    canvas[:, half:, :half][filled] = np.asarray(BAR_COLOUR, np.float32) / 255

    masks, colours, cell = _shape_masks(), _palette(COLOURS), 2 * PATCH
    pages = np.arange(count)
    for shape in range(len(SHAPES)):
        row, column = np.divmod(shape_places[:, shape], BOARD)
        rows = (half + row * cell)[:, None, None] + np.arange(cell)[None, :, None]
        columns = (half + column * cell)[:, None, None] + np.arange(cell)[None, None, :]
        under = canvas[pages[:, None, None], rows, columns]
        over = colours[shape_colours[:, shape]][:, None, None]
        canvas[pages[:, None, None], rows, columns] = under + masks[shape][None, ..., None] * (over - under)

    canvas += NOISE * rng.standard_normal(canvas.shape, np.float32)
    pixels = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    return Pages(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        letters=torch.from_numpy(letters),
        heights=torch.from_numpy(heights),
        shape_colours=torch.from_numpy(shape_colours),
        shape_places=torch.from_numpy(shape_places),
        tints=torch.from_numpy(tints),
        inks=torch.from_numpy(inks),
    )
