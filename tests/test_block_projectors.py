"""Projectors that join whole blocks of cells, against explicit formulas and the models they come from."""

from __future__ import annotations

from types import SimpleNamespace as Config
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlMultiModalProjector
from transformers.models.llama4.modeling_llama4 import pixel_shuffle
from transformers.models.mistral3.modeling_mistral3 import Mistral3PatchMerger
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from tests.rasters import C, D, image, projector, random_features, randomised, same, sequence
from vision_remember import build_projector
from vision_remember.grid import Grid
from vision_remember.projectors import STF, PixelShuffle
from vision_remember.projectors.blocks import Order, check_blocks, fitted, space_to_depth

# Space to depth


def explicit_space_to_depth(given: Tensor, grid: Grid, block: Grid, order: Order) -> Tensor:
    """One cell after the other, as the channel formulas have it."""
    (rows, columns), channels = block, given.shape[2]
    h, w = grid[0] // rows, grid[1] // columns
    cells, joined = given.unflatten(1, grid), torch.empty(len(given), h, w, rows * columns * channels)
    for k in range(rows * columns):
        cell = cells[:, k // columns :: rows, k % columns :: columns]
        if order == "block_major":
            joined[..., k * channels : (k + 1) * channels] = cell
        else:
            joined[..., k :: rows * columns] = cell
    return joined.flatten(1, 2)


@pytest.mark.parametrize("order", ["block_major", "channel_major"])
@pytest.mark.parametrize(("grid", "block"), [((8, 8), (2, 2)), ((6, 12), (3, 3)), ((6, 8), (3, 2)), ((4, 6), (1, 1))])
def test_space_to_depth_is_the_permutation_of_its_formula(grid: Grid, block: Grid, order: Order) -> None:
    given = random_features(grid)
    joined = space_to_depth(image(given, grid), block, order)
    assert torch.equal(joined, explicit_space_to_depth(given, grid, block, order))
    assert torch.equal(joined.flatten().sort()[0], given.flatten().sort()[0])


@pytest.mark.parametrize("side", [2, 3])
def test_the_two_orders_are_those_of_pytorch_and_a_permutation_apart(side: int) -> None:
    grid = (side * 3, side * 4)
    raster = image(random_features(grid), grid)
    by_channel = space_to_depth(raster, (side, side), "channel_major")
    assert torch.equal(by_channel, sequence(F.pixel_unshuffle(raster, side)))
    assert torch.equal(by_channel, F.unfold(raster, side, stride=side).transpose(1, 2))
    permutation = torch.arange(side**2 * C).view(side**2, C).T.flatten()
    by_block = space_to_depth(raster, (side, side), "block_major")
    assert torch.equal(by_block[..., permutation], by_channel)
    assert torch.equal(F.pixel_shuffle(image(by_channel, (3, 4)), side), raster)
    linear = nn.Linear(side**2 * C, D)
    convolved = F.conv2d(raster, linear.weight.view(D, C, side, side), linear.bias, stride=side)
    same(linear(by_channel), sequence(convolved))
    same(F.linear(by_block[..., permutation], linear.weight, linear.bias), linear(by_channel))


def test_joining_neighbours_of_a_row_would_be_something_else() -> None:
    given = random_features((8, 8))
    assert not torch.equal(space_to_depth(image(given, (8, 8)), (2, 2), "block_major"), given.reshape(2, 16, 4 * C))


def test_space_to_depth_is_that_of_the_models_in_transformers() -> None:

    given = random_features((12, 12))
    for side in (2, 4):
        joined = space_to_depth(image(given, (12, 12)), (side, side), "block_major")
        internvl = InternVLModel.pixel_shuffle(Config(), given.unflatten(1, (12, 12)), 1 / side)  # type: ignore[arg-type]
        assert torch.equal(joined, internvl.flatten(1, 2))
        assert torch.equal(joined, pixel_shuffle(given, 1 / side))
        for connector in (Idefics3Connector, SmolVLMConnector):
            assert torch.equal(joined, connector.pixel_shuffle(Config(), given, side))


def test_pixel_shuffle_is_internvls_projector_from_either_layout() -> None:
    config: Any = Config(
        vision_config=Config(hidden_size=C), text_config=Config(hidden_size=D), downsample_ratio=0.5,
        projector_hidden_act="gelu",
    )  # fmt: skip
    theirs = InternVLMultiModalProjector(config)
    theirs.layer_norm.load_state_dict(randomised({"weight": (4 * C,), "bias": (4 * C,)}))
    given, module = random_features((6, 6)), projector("pixel_shuffle", ratio=4)
    module.load_state_dict(theirs.state_dict())
    shuffled = InternVLModel.pixel_shuffle(Config(), given.unflatten(1, (6, 6)), 0.5)  # type: ignore[arg-type]
    expected = theirs(shuffled.flatten(1, 2))
    assert torch.equal(module(given), expected)
    released = nn.Sequential(theirs.layer_norm, theirs.linear_1, nn.GELU(), theirs.linear_2)
    module = projector("pixel_shuffle", ratio=4)
    module.load_state_dict(PixelShuffle.import_state_dict(released.state_dict()))
    assert torch.equal(module(given), expected)


@pytest.mark.parametrize(("side", "oblong"), [(2, (16, 36)), (3, (12, 27))])
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_pixel_shuffle_is_the_connector_of_idefics3_and_smolvlm(family: str, side: int, oblong: Grid) -> None:
    """On squares: they mistake an oblong grid whose area is a square for that square, without an error."""

    config = Config(vision_config=Config(hidden_size=C), text_config=Config(hidden_size=D), scale_factor=side)
    theirs = (Idefics3Connector if family == "idefics3" else SmolVLMConnector)(config)
    module = projector("pixel_shuffle", ratio=side**2, head="linear")
    module.load_state_dict(PixelShuffle.import_state_dict(theirs.state_dict()))
    assert torch.equal(module(random_features((6, 6))), theirs(random_features((6, 6))))
    given = random_features(oblong)
    tokens = module(given, oblong)
    assert torch.equal(tokens, module.proj(explicit_space_to_depth(given, oblong, (side, side), "block_major")))
    assert not torch.allclose(tokens, theirs(given))


def test_pixel_shuffle_is_lfm2_vls_projector_on_oblong_grids() -> None:
    config: Any = Config(
        vision_config=Config(hidden_size=C), text_config=Config(hidden_size=D), downsample_factor=2,
        projector_use_layernorm=True, projector_hidden_size=D, projector_bias=True, projector_hidden_act="gelu",
    )  # fmt: skip
    theirs, module = Lfm2VlMultiModalProjector(config), projector("pixel_shuffle", ratio=4)
    module.load_state_dict(theirs.state_dict())
    given = random_features((16, 36))
    same(module(given, (16, 36)), theirs(given.unflatten(1, (16, 36))).flatten(1, 2), 1e-6)


def test_pixel_shuffle_by_channels_is_mistral3s_merger() -> None:

    config: Any = Config(vision_config=Config(hidden_size=C, patch_size=14), spatial_merge_size=2)
    theirs = Mistral3PatchMerger(config)
    module = build_projector("pixel_shuffle", C, C, ratio=4, head="linear", order="channel_major")
    module.load_state_dict({"proj.weight": theirs.merging_layer.weight})
    given = random_features((4, 6))
    same(module(given, (4, 6)).flatten(0, 1), theirs(given.flatten(0, 1), [(4 * 14, 6 * 14)] * 2), 1e-6)


# Grids that do not divide


@pytest.mark.parametrize("name", ["pixel_shuffle", "stf"])
def test_blocks_that_do_not_divide_are_errors_unless_asked_for(name: str) -> None:
    module = projector(name, ratio=4)
    with pytest.raises(ValueError, match=r"14x14 of 2x2 blocks covers 28x28 cells, but .* 27x27; choose fit='pad' or"):
        module.out_grid((27, 27))
    with pytest.raises(ValueError, match=r"27x27"):
        module(random_features((27, 27), module.feature_dim), (27, 27))
    for fit in ("pad", "resize"):
        assert projector(name, ratio=4, fit=fit).out_grid((27, 27)) == (14, 14)
    with pytest.raises(ValueError, match="fit='drop': expected 'error', 'pad' or 'resize'"):
        projector(name, ratio=4, fit="drop")


@pytest.mark.parametrize("fit", ["error", "pad", "resize"])
def test_a_fit_changes_nothing_where_the_blocks_divide(fit: Any) -> None:
    given = random_features((6, 4))
    assert torch.equal(fitted(given, (6, 4), (6, 4), fit), image(given, (6, 4)))
    assert torch.equal(
        projector("pixel_shuffle", ratio=4, fit=fit)(given, (6, 4)), projector("pixel_shuffle", ratio=4)(given, (6, 4))
    )


def test_padding_repeats_the_last_row_and_column() -> None:
    given = random_features((5, 3))
    cells = given.unflatten(1, (5, 3))
    cells = torch.cat((cells, cells[:, -1:]), 1)
    padded = torch.cat((cells, cells[:, :, -1:]), 2).flatten(1, 2)
    module = projector("pixel_shuffle", ratio=4, fit="pad")
    assert torch.equal(module(given, (5, 3)), module(padded, (6, 4)))


def test_resizing_interpolates_to_whole_blocks() -> None:
    given = random_features((5, 3))
    resized = F.interpolate(image(given, (5, 3)), size=(6, 4), mode="bilinear", align_corners=False)
    module = projector("pixel_shuffle", ratio=4, fit="resize")
    assert torch.equal(module(given, (5, 3)), module(sequence(resized), (6, 4)))


def test_downward_resizing_sees_the_middle_of_each_block() -> None:
    """Without antialiasing, which is worth knowing: the centre cell of 3x3, the central four of 4x4."""
    given = random_features((12, 12))
    raster = image(given, (12, 12))
    same(fitted(given, (12, 12), (6, 6), "resize"), F.avg_pool2d(raster, 2), 1e-6)
    same(fitted(given, (12, 12), (4, 4), "resize"), raster[..., 1::3, 1::3], 1e-6)
    middle = (raster[..., 1::4, 1::4] + raster[..., 1::4, 2::4] + raster[..., 2::4, 1::4] + raster[..., 2::4, 2::4]) / 4
    same(fitted(given, (12, 12), (3, 3), "resize"), middle, 1e-6)


@pytest.mark.parametrize(
    ("grid", "out_grid", "fit", "message"),
    [
        ((24, 24), (8, 8), "error", "covers 16x16 cells.*24x24; choose another grid or block, or fit='resize'"),
        ((24, 24), (8, 8), "pad", "choose another grid or block"),
        ((4, 4), (4, 3), "pad", "8x6.*4x4"),
        ((4, 4), (4, 3), "error", "another grid or block"),
        ((8, 4), (4, 3), "pad", "8x6.*8x4; choose another grid or block"),
        ((4, 6), (4, 3), "pad", "8x6.*4x6; choose another grid or block"),
        ((9, 6), (4, 3), "pad", "8x6.*9x6; choose another grid or block"),
        ((8, 7), (4, 3), "pad", "8x6.*8x7; choose another grid or block"),
    ],
)
def test_padding_neither_makes_whole_blocks_nor_cuts_cells_off(
    grid: Grid, out_grid: Grid, fit: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_blocks(grid, out_grid, (2, 2), fit)
    assert check_blocks(grid, out_grid, (2, 2), "resize") is None


def test_a_fixed_grid_goes_with_the_block_that_was_asked_for() -> None:
    assert projector("pixel_shuffle", out_grid=(2, 3)).block == (2, 2)
    module = projector("pixel_shuffle", out_grid=(2, 3), block=(3, 1))
    assert module.linear_1.in_features == 3 * C
    assert module.out_grid((6, 3)) == (2, 3)
    assert module.options()["block"] == (3, 1)
    with pytest.raises(ValueError, match=r"block=\(0, 2\)"):
        projector("pixel_shuffle", out_grid=(2, 3), block=(0, 2))


@pytest.mark.parametrize(("option", "value"), [("order", "raster"), ("head", "conv")])
def test_unknown_options_of_pixel_shuffle_are_errors(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{option}='{value}'"):
        projector("pixel_shuffle", ratio=4, **{option: value})


# STF


def test_stf_is_the_network_of_its_release() -> None:
    crosslayer = nn.Sequential(nn.Linear(8 * C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
    spatial = nn.Sequential(nn.Linear(4 * C, 16 * C), nn.GELU(), nn.Linear(16 * C, D))
    released = {f"mm_projector_crosslayer.{key}": value for key, value in crosslayer.state_dict().items()}
    released |= {f"mm_projector.{key}": value for key, value in spatial.state_dict().items()}
    module, given = projector("stf", ratio=4), random_features((6, 8), 8 * C)
    module.load_state_dict(STF.import_state_dict(released))
    blocks = F.unfold(image(crosslayer(given), (6, 8)), 2, stride=2).transpose(1, 2)
    same(module(given, (6, 8)), spatial(blocks))


def test_stf_reads_eight_levels_the_deepest_first() -> None:
    assert STF.encoder_levels == (23, 21, 18, 15, 12, 9, 6, 3)
    module = projector("stf", ratio=4, fusion_dim=10, hidden_dim=20)
    assert module.feature_dim == 8 * C
    assert (module.fusion[0].out_features, module.mlp[0].out_features) == (10, 20)
    assert (module.options()["fusion_dim"], module.options()["hidden_dim"]) == (10, 20)
    with pytest.raises(ValueError, match=rf"H\*W, {8 * C}"):
        module(random_features((6, 8)), (6, 8))
