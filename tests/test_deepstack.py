"""DeepStack's addition: against its definition, against Qwen3-VL's patch merger, and inside a LLaVA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from tests.hosts import batch, build_llava, image_side, randomise
from tests.processors import llava_processor
from tests.reference import visible_cells
from vision_remember import SELA, attach_vision_remember, compress_projector, load_vision_remember, region_attention
from vision_remember.grid import Grid, region
from vision_remember.interactions import DeepStack

D, WIDTHS = 6, (3, 5)
C = sum(WIDTHS)
GRIDS: list[tuple[Grid, Grid, Grid]] = [
    ((2, 3), (4, 6), (2, 2)),  # each token has the cells that are told apart
    ((2, 3), (6, 6), (3, 2)),
    ((3, 2), (7, 5), (2, 2)),  # grids that do not divide
    ((2, 2), (6, 8), (1, 1)),  # the mean
    ((3, 3), (2, 2), (2, 2)),  # fewer cells than tokens
]


def made(**options: Any) -> DeepStack:
    torch.manual_seed(0)
    return DeepStack(D, C, level_dims=WIDTHS, zero_init=False, **options).double()


def image(token_grid: Grid, feature_grid: Grid, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    cells = math.prod(feature_grid)
    return {
        "tokens": torch.randn(batch, math.prod(token_grid), D, generator=generator, dtype=torch.float64),
        "features": torch.randn(batch, cells, C, generator=generator, dtype=torch.float64),
        "token_grid": token_grid,
        "feature_grid": feature_grid,
        "saliency": torch.rand(batch, cells, generator=generator, dtype=torch.float64),
    }


def by_loops(module: DeepStack, given: dict[str, Any]) -> Tensor:
    """The update, token by token and place by place."""
    (h, w), (H, W), (rows, columns) = given["token_grid"], given["feature_grid"], module.cells
    normed = []
    for level in given["features"].split(WIDTHS, dim=-1):
        centred = level - level.mean(-1, keepdim=True)
        normed.append(centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * given["saliency"][..., None])
    updates = []
    for i in range(h):
        for j in range(w):
            read: Tensor = torch.zeros((), dtype=torch.float64)
            for level, weight in zip(
                normed, module.vr_in.weight.split([rows * columns * c for c in WIDTHS], dim=1), strict=True
            ):
                pieces = []
                for a in range(rows):
                    for b in range(columns):
                        first, last = region(i * rows + a, i * rows + a + 1, h * rows, H)
                        left, right = region(j * columns + b, j * columns + b + 1, w * columns, W)
                        cells = [y * W + x for y in range(first, last) for x in range(left, right)]
                        pieces.append(level[:, cells].mean(1))
                read = read + torch.cat(pieces, dim=-1) @ weight.T
            hidden = read + module.vr_in.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            updates.append(module.vr_out(hidden))
    return torch.stack(updates, dim=1)


@pytest.mark.parametrize(("token_grid", "feature_grid", "cells"), GRIDS)
def test_it_is_its_definition(token_grid: Grid, feature_grid: Grid, cells: Grid) -> None:
    module, given = made(cells=cells), image(token_grid, feature_grid)
    torch.testing.assert_close(module(**given), by_loops(module, given))


def test_levels_one_by_one_are_levels_joined() -> None:
    module, given = made(), image((3, 2), (7, 5))
    expected = module(**given)
    given["features"] = list(given["features"].split(WIDTHS, dim=-1))
    torch.testing.assert_close(module(**given), expected)


def test_one_cell_per_token_is_the_mean_of_the_region() -> None:
    module, given = made(cells=(1, 1), feature_norm="none"), image((3, 4), (7, 9))
    seen = visible_cells((3, 4), (7, 9)).double()
    mean = (seen / seen.sum(1, keepdim=True)) @ given["features"]
    given["saliency"] = None
    torch.testing.assert_close(
        module(**given), module(**{**given, "features": mean, "feature_grid": (3, 4)}), rtol=1e-9, atol=1e-12
    )


def test_of_one_level_it_is_the_patch_merger_of_qwen3_vl() -> None:
    torch.manual_seed(0)
    merger: Any = Qwen3VLVisionPatchMerger(
        Qwen3VLVisionConfig(hidden_size=C, out_hidden_size=D, spatial_merge_size=2), use_postshuffle_norm=False
    ).double()
    merger.norm.eps = 1e-5
    module = DeepStack(D, C, attn_dim=4 * C).double()
    ours, theirs = (module.vr_in, module.vr_out), (merger.linear_fc1, merger.linear_fc2)
    for to, of in zip(ours, theirs, strict=True):
        assert isinstance(to, nn.Linear)
        to.load_state_dict(of.state_dict())
    given = image((3, 2), (6, 4), batch=1)
    raster = given["features"][0].view(6, 4, C)
    blocks = [raster[y : y + 2, x : x + 2].flatten(0, 1) for y in range(0, 6, 2) for x in range(0, 4, 2)]
    given["saliency"] = None
    torch.testing.assert_close(module(**given)[0], merger(torch.cat(blocks)))


@pytest.mark.parametrize("cells", [(1, 1), (2, 2), (3, 2)])
def test_it_has_as_many_weights_as_the_page_on_neighbours_says(cells: Grid) -> None:
    """Against SELA of the same width; r*r cells of all levels' C channels."""
    width = 8
    weights = [p.numel() for p in made(attn_dim=width, cells=cells).parameters() if p.ndim > 1]
    assert sum(weights) == width * (math.prod(cells) * C + D)
    sela = SELA(D, C, level_dims=WIDTHS, attn_dim=width, position="none")
    assert sum(p.numel() for p in sela.parameters() if p.ndim > 1) == width * (2 * C + 2 * D)


def test_the_token_decides_nothing() -> None:
    module, given = made(), image((2, 3), (4, 6))
    expected = module(**given)
    given["tokens"] = 100 * torch.randn_like(given["tokens"])
    assert torch.equal(module(**given), expected)


@pytest.mark.parametrize(("token_grid", "feature_grid"), [((2, 1), (4, 2)), ((2, 2), (3, 5))])
def test_gradients(token_grid: Grid, feature_grid: Grid) -> None:
    module, given = made(), image(token_grid, feature_grid, batch=1)
    tokens, features, saliency = (given.pop(name) for name in ("tokens", "features", "saliency"))

    def update(features: Tensor, saliency: Tensor) -> Tensor:
        return module(tokens, features, saliency=saliency, **given)

    assert torch.autograd.gradcheck(update, (features.requires_grad_(), saliency.requires_grad_()))


@pytest.mark.parametrize("cells", [(0, 2), (2,), (2, 2.5)])
def test_cells_that_are_no_grid_are_an_error(cells: Any) -> None:
    with pytest.raises(ValueError, match="cells="):
        DeepStack(D, C, cells=cells)


def processor_of(model: Any) -> Any:
    return llava_processor("clip", image_side(model), model.config.vision_config.patch_size)


def test_in_a_llava_it_starts_as_identity_learns_generates_and_is_saved(tmp_path: Path) -> None:
    model = build_llava()
    compress_projector(model, processor_of(model), "adaptive_avg_pool", ratio=4)
    inputs = batch(model)
    with torch.no_grad():
        plain = model(**inputs).logits
    handle = attach_vision_remember(model, [0, 1], interaction="deepstack")
    assert handle.config.cells == (2, 2)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)
    randomise(handle)
    with torch.no_grad():
        changed = model(**inputs).logits
    assert not torch.allclose(changed, plain, atol=1e-2)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **greedy), model.generate(**inputs, **greedy, use_cache=False))
    with pytest.raises(ValueError, match="interaction='deepstack' has no attention weights"):
        region_attention(model, inputs, 1)
    handle.save_pretrained(tmp_path)
    twin = build_llava()
    load_vision_remember(twin, tmp_path, processor_of(twin))
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, changed)
