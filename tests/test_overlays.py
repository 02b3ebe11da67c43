"""Maps over images and the forgetting curve: geometry against the host's own stitching, probes by known answers."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from tests.fingerprint import Fingerprint
from tests.hosts import IMAGE_TOKEN, batch, build_llava, randomise
from tests.test_tiled_hosts import build, pixels_of, prompt
from vision_remember import (
    MultiLevelTap,
    VisionRemember,
    attach_vision_remember,
    forgetting_curve,
    region_attention,
    saliency_map,
)
from vision_remember.adapters.transport import rows_of
from vision_remember.analysis import RegionAttention, SaliencyMap, linear_probe, saliency_maps
from vision_remember.memory import VisionMemory, spans

SIZES = [(40, 61), (90, 33), (30, 30)]


def attached(**options: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    model = build_llava()
    handle = attach_vision_remember(model, [1, 3], **options)
    randomise(handle)
    return model, handle, batch(model)


def test_the_map_of_a_plain_host_is_the_encoders() -> None:
    model, handle, inputs = attached()
    config = handle.config
    tap = MultiLevelTap(
        model.model.vision_tower, config.levels, variant=config.saliency_variant, center=config.saliency_center
    )
    with torch.no_grad(), tap.capture() as captured:
        model.model.vision_tower(inputs["pixel_values"])
    maps = saliency_map(model, inputs)
    assert len(maps) == 3
    assert captured.saliency is not None
    for found, expected in zip(maps, captured.saliency.view(3, 8, 8), strict=True):
        assert found.stitched is not None
        torch.testing.assert_close(found.stitched, expected)
        assert found.resized(32, 40).shape == (32, 40)
    with handle.disabled():
        assert torch.equal(saliency_map(model, inputs)[1].tiles, maps[1].tiles)


@pytest.mark.parametrize("host", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_tiles_are_stitched_as_the_host_stitches_them(host: str, encoder: str) -> None:
    """Saliency that is the cell's own place in the stitched raster, against the host's own function on that raster."""
    model = build(host, encoder)
    attach_vision_remember(model, [0])
    with torch.no_grad():
        (memory,) = rows_of(model.model.get_image_features(**pixels_of(model, SIZES)))[0].memory  # type: ignore[index]
    side, (H, W) = model.config.vision_config.image_size, memory.feature_grid
    saliency, expected = torch.full((len(memory.levels[0]), H, W), -1.0), []
    for size, span in zip(SIZES, memory.spans, strict=True):
        rows, columns = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, side)
        raster = torch.arange(rows * H * columns * W).float().view(rows, H, columns, W)
        saliency[span.tiles.start + 1 : span.tiles.stop] = raster.transpose(1, 2).flatten(0, 1)
        expected.append(unpad_image(raster.view(1, rows * H, columns * W), size)[0])
    maps = saliency_maps((replace(memory, saliency=saliency.flatten(1)),))
    for found, raster, span in zip(maps, expected, memory.spans, strict=True):
        assert torch.equal(found.stitched, raster)  # type: ignore[arg-type]
        assert len(found.tiles) == len(span.tiles) > 1


def test_cells_under_stitched_tokens_keep_their_resolution() -> None:
    """Two tiles of 2x2 tokens over 4x4 cells side by side, below the overview; the last column is padding."""
    slots = torch.tensor([0, 1, 2, 3, 4, 5, 8, -1, 6, 7, 10, -1])
    saliency = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    memory = VisionMemory((torch.zeros(3, 16, 2),), saliency, (4, 4), (2, 2), spans([12], [3]), slots)
    (found,) = saliency_maps((memory,))
    left, right = saliency[1].view(4, 4), saliency[2].view(4, 4)
    assert torch.equal(found.stitched, torch.cat([left, right[:, :2]], 1))  # type: ignore[arg-type]


def test_tiles_that_a_host_keeps_apart_are_not_stitched() -> None:
    memory = VisionMemory((torch.zeros(2, 4, 2),), torch.rand(2, 4), (2, 2), (2, 2), spans([8], [2]))
    (found,) = saliency_maps((memory,))
    assert found.stitched is None
    assert found.tiles.shape == (2, 2, 2)
    with pytest.raises(ValueError, match="keeps the 2 tiles of this image apart"):
        found.resized(4, 4)
    (ended,) = saliency_maps((replace(memory, slots=torch.arange(8), spans=spans([8], [2])),))
    assert ended.stitched is None


def test_a_map_is_resized_by_bilinear_interpolation() -> None:
    found = SaliencyMap(torch.zeros(1, 2, 2), torch.tensor([[0.0, 4.0], [8.0, 12.0]]))
    columns, rows = torch.tensor([0.0, 1.0, 3.0, 4.0]), torch.tensor([[0.0], [2.0], [6.0], [8.0]])
    torch.testing.assert_close(found.resized(4, 4), columns + rows)


def test_maps_need_saliency_images_and_an_attachment() -> None:
    model, handle, inputs = attached(saliency=None)
    with pytest.raises(ValueError, match="without saliency"):
        saliency_map(model, inputs)
    with pytest.raises(ValueError, match="expected pixel_values"):
        saliency_map(model, {"input_ids": inputs["input_ids"]})
    with pytest.raises(ValueError, match="no image among them"):
        region_attention(model, {"input_ids": torch.tensor([[5, 6]])}, 1)
    with pytest.raises(ValueError, match=r"layer=2: blocks stand in front of layers \[1, 3\]"):
        region_attention(model, inputs, 2)
    for look in (forgetting_curve, lambda model, inputs: region_attention(model, inputs, 1)):
        with handle.disabled(), pytest.raises(ValueError, match="the blocks are switched off"):
            look(model, inputs)
    handle.detach()
    for ask in (saliency_map, forgetting_curve):
        with pytest.raises(RuntimeError, match="no Vision Remember is attached"):
            ask(model, inputs)
    attach_vision_remember(model, [1], interaction="deformable")
    with pytest.raises(ValueError, match="'deformable' has no attention weights"):
        region_attention(model, inputs, 1)


@pytest.mark.parametrize("layer", [1, 3])
def test_region_attention_is_what_the_block_computes(layer: int) -> None:
    """Values that are one-hot per cell make the block's own reading its map."""
    model, handle, inputs = attached(window=2)
    saliency_map(model, inputs)  # transformers leaves hooks of its own in a first pass
    before = Fingerprint(model)
    (found,) = region_attention(model, inputs, layer)
    before.check(model)
    block: VisionRemember = handle.module[str(layer)]  # type: ignore[assignment]
    seen: dict[str, Any] = {}
    interaction: Any = block.interaction

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **grids: Any) -> torch.Tensor:
        seen.update(read=type(interaction).read(interaction, query, key, value, **grids), value=value)
        return seen["read"]

    interaction.read, interaction.backend = spy, "naive"  # the loop reads cell by cell, in raster order
    with torch.no_grad():
        model(**inputs)
    torch.testing.assert_close(found.weights @ seen["value"], seen["read"], rtol=1e-4, atol=1e-4)
    assert found.weights.shape == (3, interaction.num_heads, 64, 64)
    cropped = found.in_region(2, 5, 3)
    assert torch.equal(cropped, found.over_tile(2, 5, 3)[:, 4:6, 2:4])
    torch.testing.assert_close(cropped.sum((1, 2)), torch.ones(len(cropped)))


def test_global_attention_has_the_tile_for_its_region() -> None:
    model, _, inputs = attached(interaction="global")
    (found,) = region_attention(model, inputs, 1)
    assert torch.equal(found.in_region(0, 1, 1), found.over_tile(0, 1, 1))
    with pytest.raises(ValueError, match="3 tiles of 8x8 tokens"):
        found.over_tile(3, 0, 0)


def test_regions_of_grids_that_do_not_divide() -> None:
    found = RegionAttention(torch.rand(1, 2, 6, 35), (2, 3), (5, 7), window=1)
    assert torch.equal(found.in_region(0, 1, 1), found.over_tile(0, 1, 1)[:, 2:5, 2:5])


# A probe that knows the answer, one that cannot, and the same by another route.


def test_a_probe_reads_what_is_there_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(300, 10, generator=generator)
    train = torch.arange(300) % 2 == 0
    linear = states[:, :3] @ torch.randn(3, 2, generator=generator) + 5
    assert linear_probe(states, linear, train, ridge=1e-9) == pytest.approx(1, abs=1e-6)
    assert linear_probe(states, torch.randn(300, 2, generator=generator), train) < 0.05
    classes = states[:, :4].argmax(1)
    assert linear_probe(states, classes, train) > 0.8
    assert linear_probe(states, classes[torch.randperm(300, generator=generator)], train) < 0.45


@pytest.mark.parametrize("number", [torch.int16, torch.uint8, torch.bool, torch.int64])
def test_classes_are_whole_numbers_of_any_kind(number: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(80, 6, generator=generator)
    classes, train = (states[:, 0] > 0).long(), torch.arange(80) % 2 == 0
    expected = linear_probe(states, classes, train)
    assert 0.8 < expected < 1
    assert linear_probe(states, classes.to(number), train) == expected
    if number == torch.int64:
        assert linear_probe(states, 10**12 * classes - 1, train) == expected  # no column for every number up to it


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_have_no_score(bad: float) -> None:
    states, train = torch.randn(8, 2), torch.arange(8) % 2 == 0
    for row in (0, 1):
        wrong = states.clone()
        wrong[row, 0] = bad
        assert math.isnan(linear_probe(wrong, torch.arange(8) % 3, train))
        assert math.isnan(linear_probe(wrong, torch.rand(8, 1), train))


@pytest.mark.parametrize("width", [5, 80])
def test_a_probe_is_ridge_regression(width: int) -> None:
    """Least squares with the penalty as rows of their own, for few and for many channels; one channel is constant."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(60, width, generator=generator, dtype=torch.float64)
    states[:, 0] = 3
    targets = torch.randn(60, 2, generator=generator, dtype=torch.float64) + states[:, 1:2]
    train = torch.arange(60) < 40
    x = (states - states[train].mean(0)) / states[train].std(0, unbiased=False).clamp(min=1e-30)
    x[:, 0] = 0
    y = targets - targets[train].mean(0)
    penalty = (0.1 * 40) ** 0.5 * torch.eye(width, dtype=torch.float64)
    rows = torch.cat([x[train], penalty]), torch.cat([y[train], torch.zeros(width, 2, dtype=torch.float64)])
    error = (x[~train] @ torch.linalg.lstsq(*rows).solution - y[~train]).square().sum()
    expected = 1 - error / (targets[~train] - targets[~train].mean(0)).square().sum()
    assert linear_probe(states, targets, train, ridge=0.1) == pytest.approx(float(expected), rel=1e-9)


def test_a_probe_refuses_what_it_cannot_fit() -> None:
    states, train = torch.randn(6, 2), torch.arange(6) < 3
    with pytest.raises(ValueError, match=r"targets \(5, 2\)"):
        linear_probe(states, torch.randn(5, 2), train)
    with pytest.raises(ValueError, match=r"give real numbers as \(N, 1\)"):
        linear_probe(states, torch.randn(6), train)
    with pytest.raises(ValueError, match="ridge=0"):
        linear_probe(states, torch.randn(6, 1), train, ridge=0)
    with pytest.raises(ValueError, match="6 of 6 rows"):
        linear_probe(states, torch.randn(6, 1), train | True)


def test_the_curve_is_that_of_the_hidden_states() -> None:
    model, handle, inputs = attached()
    saliency_map(model, inputs)  # transformers leaves hooks of its own in a first pass
    before = Fingerprint(model)
    found = forgetting_curve(model, inputs, target="position")
    before.check(model)
    at = inputs["input_ids"] == IMAGE_TOKEN
    token = torch.arange(64)
    places = torch.stack([token // 8, token % 8], -1).float().repeat(3, 1)
    train = torch.arange(192) // 64 != 1
    with torch.no_grad(), handle.disabled():
        states = model(**inputs, output_hidden_states=True).hidden_states
    # The last of the host's is behind the final norm.
    expected = [linear_probe(state[at], places, train) for state in states[:-1]]
    torch.testing.assert_close(found.plain[:-1], torch.tensor(expected), rtol=1e-3, atol=1e-3)
    assert (found.score, found.fitted, found.tested) == ("r2", 128, 64)
    assert torch.equal(found.remembered[0], found.plain[0])
    assert not torch.isclose(found.remembered[1:], found.plain[1:], atol=1e-4).any()


def test_passes_of_other_threads_are_left_alone_and_not_read() -> None:
    model, handle, inputs = attached()
    other, here = batch(model, (1, 1), seed=3), threading.get_ident()
    (look,), curve = region_attention(model, inputs, 1), forgetting_curve(model, inputs)
    with torch.no_grad():
        expected = {True: model(**other).logits}
        with handle.disabled():
            expected[False] = model(**other).logits
    seen = []

    def beside(*_: object) -> None:
        if threading.get_ident() == here:
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(model, **other).result().logits)

    with model.model.language_model.layers[0].register_forward_pre_hook(beside):
        (found,) = region_attention(model, inputs, 1)
        again = forgetting_curve(model, inputs)
    assert torch.equal(found.weights, look.weights)
    assert torch.equal(again.remembered, curve.remembered)
    assert torch.equal(again.plain, curve.plain)
    for logits, enabled in zip(seen, (True, True, False), strict=True):
        torch.testing.assert_close(logits, expected[enabled], rtol=1e-3, atol=1e-3)


def test_fresh_blocks_forget_and_remember_nothing() -> None:
    model = build_llava()
    attach_vision_remember(model, [1, 3])
    found = forgetting_curve(model, batch(model), target="cell")
    assert torch.equal(found.remembered, found.plain)
    assert found.score == "accuracy"


def test_a_target_of_ones_own_is_read_where_it_is() -> None:
    model, _, inputs = attached()
    with torch.no_grad():
        tokens = torch.cat(list(model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output))
    found = forgetting_curve(model, inputs, target=tokens[:, :3], ridge=1e-9)
    assert found.plain[0] == pytest.approx(1, abs=1e-3)
    assert found.plain[-1] < found.plain[0]


def test_separators_of_tiled_hosts_are_left_out() -> None:
    model = build()
    attach_vision_remember(model, [1])
    inputs = prompt(model, [SIZES[:2]])
    found = forgetting_curve(model, inputs)
    newlines = 1 + int((inputs["input_ids"] == IMAGE_TOKEN).sum()) - found.fitted - found.tested
    assert newlines > 10
    assert torch.isfinite(found.plain).all()


def test_the_curve_refuses_what_it_cannot_score() -> None:
    model, _, inputs = attached()
    with pytest.raises(ValueError, match="one image"):
        forgetting_curve(model, batch(model, (1,)))
    with pytest.raises(ValueError, match="target has 5 rows, but the images have 192 vision tokens"):
        forgetting_curve(model, inputs, target=torch.zeros(5, 1))
    with pytest.raises(ValueError, match="target='colour'"):
        forgetting_curve(model, inputs, target="colour")  # type: ignore[arg-type]
