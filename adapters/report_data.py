"""One image, one question, and what Vision Remember does with them, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_remember.adapters.analysis import attention_density
from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.overlays import region_attention, saliency_map
from vision_remember.adapters.prompts import decoded, prompt_inputs, prompt_text
from vision_remember.adapters.resolve import resolve
from vision_remember.analysis import AttentionDensity, RegionAttention, SaliencyMap
from vision_remember.grid import Grid

Picture = np.ndarray[Any, Any]
"""(height, width, 3), uint8."""


@dataclass(frozen=True)
class Report:
    """What one forward pass and one answer show.

    Attributes:
        model: its name, for the title.
        attached: what was attached where, as :meth:`VisionRememberHandle.summary` says.
        question: what was asked.
        prompt: as the model read it.
        answer: greedy, with Vision Remember.
        plain_answer: greedy, without.
        change: how far the blocks move the distribution of the next token, in total variation: 0 nothing, 1 all of it.
        image: the picture as it was given.
        tiles: the tiles as the encoder saw them; none where the processor hands over loose patches.
        saliency: over the image; None with a note on why.
        looks: where tokens re-read, by layer with a block; empty with a note on why.
        token: (row, column) in the first tile, the token whose looks are drawn.
        density: attention density with Vision Remember; None with a note on why.
        plain_density: the same without.
        notes: what could not be shown, and why, by section.
    """

    model: str
    attached: Mapping[str, str]
    question: str
    prompt: str
    answer: str
    plain_answer: str
    change: float
    image: Picture
    tiles: tuple[Picture, ...]
    saliency: SaliencyMap | None
    looks: Mapping[int, RegionAttention]
    token: Grid
    density: AttentionDensity | None
    plain_density: AttentionDensity | None
    notes: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain data, without the pictures; None for what is not a number."""
        densities = {
            name: {group: _plain(found.per_layer(group)) for group in ("vision", "text", "system")}
            for name, found in (("remembered", self.density), ("plain", self.plain_density))
            if found is not None
        }
        return {
            **{name: getattr(self, name) for name in ("model", "question", "prompt", "answer", "plain_answer")},
            "attached": dict(self.attached),
            "change": self.change,
            "token": list(self.token),
            "saliency": None if self.saliency is None else [_plain(tile) for tile in self.saliency.tiles],
            "looks": {str(layer): _plain(look.in_region(0, *self.token)) for layer, look in self.looks.items()},
            "attention_density": densities,
            "notes": dict(self.notes),
        }


@torch.no_grad()
def make_report(
    model: nn.Module, processor: Any, image: Any, question: str, *, token: Grid | None = None, max_new_tokens: int = 64
) -> Report:
    """Asks an attached model about an image and looks inside.

    Args:
        model: a model that Vision Remember is attached to; it runs in the mode that it is in.
        processor: the model's.
        image: a PIL image.
        question: about it.
        token: (row, column) in the first tile, the token whose attention is kept; None for the most salient one.
        max_new_tokens: of each answer.

    Raises:
        ValueError: a token outside the tile, or a processor that cannot make a prompt.
        RuntimeError: nothing is attached.
    """
    attachment = find_attachment(model)
    if attachment is None:
        raise RuntimeError(
            f"no Vision Remember is attached to this {type(model).__name__}: attach_vision_remember(model) first, "
            "which changes no output"
        )
    handle = VisionRememberHandle(attachment)
    if token is not None:
        _check_token(token, handle.config.token_grid or resolve(model, attachment.spec).token_grid)
    inputs = prompt_inputs(processor, image, question, model)
    notes: dict[str, str] = {}
    saliency = density = plain_density = None
    try:
        saliency = _of_one_picture(saliency_map(model, inputs))
    except ValueError as error:
        notes["saliency"] = str(error)
    looks: dict[int, RegionAttention] = {}
    try:
        for layer in handle.config.layers:
            looks[layer] = region_attention(model, inputs, layer)[0]
    except ValueError as error:
        notes["looks"] = str(error)
    chosen = _chosen(token, saliency, looks)
    answer, after = _answer(model, processor, inputs, max_new_tokens)
    with handle.disabled():
        plain_answer, before = _answer(model, processor, inputs, max_new_tokens)
    try:
        density = attention_density(model, inputs, queries="last")
        with handle.disabled():
            plain_density = attention_density(model, inputs, queries="last")
    except ValueError as error:
        notes["density"] = str(error)
    return Report(
        model=getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        attached=handle.summary(),
        question=question,
        prompt=prompt_text(processor, question),
        answer=answer,
        plain_answer=plain_answer,
        change=float((after - before).abs().sum() / 2),
        image=np.asarray(image.convert("RGB")),
        tiles=_tiles_seen(processor, inputs, saliency, looks),
        saliency=saliency,
        looks=looks,
        token=chosen,
        density=density,
        plain_density=plain_density,
        notes=notes,
    )


def _of_one_picture(maps: tuple[SaliencyMap, ...]) -> SaliencyMap:
    """The maps of one picture as one: to some hosts each tile that their processor cuts is an image of its own.

    Raises:
        ValueError: tiles of several sizes.
    """
    if len(maps) == 1:
        return maps[0]
    if len({tuple(tiles.tiles.shape[1:]) for tiles in maps}) > 1:
        raise ValueError(f"the processor cuts the picture into {len(maps)} tiles, which are not of one size")
    return SaliencyMap(torch.cat([tiles.tiles for tiles in maps]), None)


def _check_token(token: Grid, grid: Grid | None) -> None:
    """Before the model runs, where images do not have grids of any size (None)."""
    if grid is not None and not all(0 <= at < size for at, size in zip(token, grid, strict=True)):
        (h, w), (row, column) = grid, token
        raise ValueError(
            f"token in row {row}, column {column}: a tile has {h}x{w} tokens, rows 0..{h - 1} and columns 0..{w - 1}"
        )


def _answer(model: Any, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> tuple[str, Tensor]:
    """The greedy answer, and (V,) the distribution of its first token."""
    first = model(**inputs).logits[0, -1].float().softmax(-1).cpu()
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return decoded(processor, ids[0, inputs["input_ids"].shape[1] :]), first


def _chosen(token: Grid | None, saliency: SaliencyMap | None, looks: Mapping[int, RegionAttention]) -> Grid:
    """The token to draw, checked: the one that is asked for, the most salient one, or the one in the middle."""
    if not looks:
        return token or (0, 0)
    look = next(iter(looks.values()))
    h, w = look.token_grid
    if token is not None:
        look.over_tile(0, *token)  # for its error
        return token
    if saliency is None:
        return h // 2, w // 2
    seen = F.adaptive_avg_pool2d(saliency.tiles[:1].float(), (h, w))[0]
    row, column = divmod(int(seen.argmax()), w)
    return row, column


def _tiles_seen(
    processor: Any, inputs: dict[str, Any], saliency: SaliencyMap | None, looks: Mapping[int, RegionAttention]
) -> tuple[Picture, ...]:
    """The tiles in colours again; none where ``pixel_values`` are not whole tiles in the order of the maps."""
    pixels = inputs["pixel_values"]
    if saliency is not None:
        count, H, W = saliency.tiles.shape
    elif looks:
        look = next(iter(looks.values()))
        count, (H, W) = len(look.weights), look.feature_grid
    else:
        return ()
    if pixels.ndim not in (4, 5):
        return ()
    tiles = pixels.flatten(0, -4)
    if len(tiles) != count or tiles.shape[1] != 3 or tiles.shape[2] * W != tiles.shape[3] * H:
        return ()
    images = getattr(processor, "image_processor", processor)
    mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    colours = tiles.float().cpu()
    if getattr(images, "do_normalize", True) and mean is not None and std is not None:
        colours = colours * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    bytes_ = (colours.clamp(0, 1) * 255).round().to(torch.uint8)
    return tuple(tile.permute(1, 2, 0).numpy() for tile in bytes_)


def _plain(tensor: Tensor) -> Any:
    """Nested lists; None for NaN, which JSON does not know."""
    if tensor.ndim:
        return [_plain(part) for part in tensor]
    return None if tensor.isnan() else round(float(tensor), 6)
