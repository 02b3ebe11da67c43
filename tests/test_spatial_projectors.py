"""Projectors whose tokens keep the image's order: their sizes, what they share, and those around LLaVA's MLP."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.rasters import C, D, image, projector, random_features, same, sequence
from vision_remember import PROJECTORS, build_projector
from vision_remember.grid import Grid, region
from vision_remember.projectors import LDP, MLP, STF, AdaptiveAvgPool, CAbstractor, LDPv2, Matryoshka, PixelShuffle
from vision_remember.projectors.adaptive_avg_pool import average_pooled
from vision_remember.projectors.matryoshka import nested_grids

MINE: dict[str, dict[str, Any]] = {
    "adaptive_avg_pool": {},
    "c_abstractor": {"depth": 1, "position_grid": (4, 4)},
    "ldp": {},
    "ldpv2": {},
    "matryoshka": {},
    "pixel_shuffle": {"fit": "pad"},
    "stf": {"fit": "resize"},
}


# Sizes


@pytest.mark.parametrize(
    ("name", "options", "at_896", "at_4096"),
    [
        ("mlp", {}, 1_722_112, 20_979_712),
        ("adaptive_avg_pool", {"ratio": 4}, 1_722_112, 20_979_712),
        ("matryoshka", {"ratio": 4}, 1_722_112, 20_979_712),
        ("ldp", {"ratio": 4}, 4_156_096, 71_428_096),
        ("ldpv2", {"ratio": 4}, 1_731_072, 21_020_672),
        ("pixel_shuffle", {"ratio": 4}, 4_482_816, 33_570_816),
        ("pixel_shuffle", {"ratio": 9}, 9_080_576, 54_552_576),
        ("pixel_shuffle", {"ratio": 16}, 15_517_440, 83_927_040),
        ("pixel_shuffle", {"ratio": 4, "head": "linear"}, 3_670_016, 16_777_216),
        ("pixel_shuffle", {"ratio": 9, "head": "linear"}, 8_257_536, 37_748_736),
        ("pixel_shuffle", {"ratio": 16, "head": "linear"}, 14_680_064, 67_108_864),
        ("c_abstractor", {"ratio": 4}, 18_140_416, 37_398_016),
        ("c_abstractor", {"out_grid": (3, 5)}, 18_140_416, 37_398_016),
        ("stf", {"ratio": 4}, 119_560_064, 171_992_064),
    ],
)
def test_parameter_counts_are_those_of_the_releases(
    name: str, options: dict[str, Any], at_896: int, at_4096: int
) -> None:
    for out_dim, count in ((896, at_896), (4096, at_4096)):
        with torch.device("meta"):
            module = build_projector(name, 1024, out_dim, **options)
        assert sum(p.numel() for p in module.parameters()) == count


def test_parts_have_the_sizes_of_their_formulas() -> None:
    with torch.device("meta"):
        abstractor, stf = CAbstractor(1024, 896, ratio=4), STF(1024, 896, ratio=4)
        v2, mlp = LDPv2(1024, 896, ratio=4), MLP(1024, 896)

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert size(abstractor.stage_1[0]) == 2_638_080
    assert size(stf.fusion) == 37_753_856
    assert size(stf.mlp) == 81_806_208
    assert size(v2) - size(mlp) == 10 * 896


# What all of them share


@pytest.mark.parametrize("grid", [(24, 36), (27, 27), (16, 36), (5, 3)], ids=str)
@pytest.mark.parametrize("name", MINE)
def test_out_grid_is_known_before_the_tokens_and_right(name: str, grid: Grid) -> None:
    module = projector(name, ratio=4, **MINE[name])
    out_grid = module.out_grid(grid)
    assert out_grid == (-(-grid[0] // 2), -(-grid[1] // 2))
    assert module(random_features(grid, module.feature_dim), grid).shape == (2, math.prod(out_grid), D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(6, 8), (5, 7)], ids=str)
@pytest.mark.parametrize("name", [*MINE, "mlp"])
def test_input_is_untouched_and_dtype_kept(name: str, grid: Grid, dtype: torch.dtype) -> None:
    module = projector(name, ratio=1 if name == "mlp" else 4, **MINE.get(name, {})).to(dtype)
    given = random_features(grid, module.feature_dim).to(dtype)
    before, version = given.clone(), given._version
    assert module(given, grid).dtype == dtype
    assert torch.equal(given, before)
    assert given._version == version


@pytest.mark.parametrize("name", ["adaptive_avg_pool", "matryoshka", "pixel_shuffle", "stf"])
def test_a_token_depends_on_the_cells_of_its_block_and_on_no_other(name: str) -> None:
    module = projector(name, out_grid=(2, 3), **({"block": (3, 2)} if name in ("pixel_shuffle", "stf") else {}))
    given = random_features((6, 6), module.feature_dim)
    plain = module(given, (6, 6))
    for row in range(6):
        for column in range(6):
            changed = given.clone()
            changed[:, row * 6 + column] += 3
            moved = (module(changed, (6, 6)) - plain).abs().amax((0, 2)) > 1e-4
            assert moved.nonzero().flatten().tolist() == [row // 3 * 3 + column // 2]


@pytest.mark.parametrize("module_class", PROJECTORS.values())
def test_no_projector_holds_a_fused_attention(module_class: type[nn.Module]) -> None:
    """It reads its weights past its children: adapters and hooks there would be skipped."""
    options = {"hidden_dim": 24, "num_layers": 2, "num_heads": 2} if module_class.__name__ == "QFormer" else {}
    module = module_class(16, 24, ratio=1, **options)
    assert not any(isinstance(part, nn.MultiheadAttention) for part in module.modules())


# Adaptive average pooling


@pytest.mark.parametrize("out_grid", [(12, 12), (14, 9), (27, 1)], ids=str)
@pytest.mark.parametrize("grid", [(27, 27), (27, 16), (30, 24)], ids=str)
def test_pooling_averages_the_cells_under_each_token(grid: Grid, out_grid: Grid) -> None:
    given = random_features(grid)
    cells = given.unflatten(1, grid)
    means = [
        cells[:, slice(*region(i, i + 1, out_grid[0], grid[0])), slice(*region(j, j + 1, out_grid[1], grid[1]))]
        .mean((1, 2))
        for i in range(out_grid[0])
        for j in range(out_grid[1])
    ]  # fmt: skip
    same(average_pooled(given, grid, out_grid), torch.stack(means, 1), 1e-6)
    ones = torch.ones_like(given)
    same(average_pooled(ones, grid, out_grid), ones[:, : math.prod(out_grid)], 1e-6)


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_equal_blocks_pool_like_every_other_average(side: int) -> None:
    given, out_grid = random_features((24, 24)), (24 // side, 24 // side)
    pooled = average_pooled(given, (24, 24), out_grid)
    same(pooled, sequence(F.avg_pool2d(image(given, (24, 24)), side)), 1e-6)
    same(pooled, sequence(F.interpolate(image(given, (24, 24)), size=out_grid, mode="area")), 1e-6)
    if side == 1:
        assert torch.equal(pooled, given)


def test_pooling_commutes_with_a_linear_layer_but_not_with_the_mlp() -> None:
    before, after = projector("adaptive_avg_pool", ratio=4), projector("matryoshka", ratio=4)
    after.load_state_dict(before.state_dict())
    given = random_features((8, 8))
    linear = nn.Linear(C, D)
    pooled_last = average_pooled(linear(given), (8, 8), (4, 4))
    same(linear(average_pooled(given, (8, 8), (4, 4))), pooled_last, 1e-6)
    assert (before(given) - after(given)).abs().max() > 1e-2


# MLP


def test_the_mlp_is_llavas_and_reads_its_first_release() -> None:
    released = nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D))
    module = projector("mlp")
    module.load_state_dict(MLP.import_state_dict(released.state_dict()))
    given = random_features((3, 5))
    assert torch.equal(module(given, (3, 5)), released(given))


@pytest.mark.parametrize("options", [{"ratio": 4}, {"out_grid": (2, 3)}], ids=str)
def test_the_mlp_does_not_compress(options: dict[str, Any]) -> None:
    module = projector("mlp", **options)
    with pytest.raises(ValueError, match=r"keeps the features' grid 4x6 and cannot make 2x3"):
        module.out_grid((4, 6))
    assert projector("mlp", out_grid=(4, 6)).out_grid((4, 6)) == (4, 6)


@pytest.mark.parametrize("name", ["mlp", "matryoshka", "ldp", "ldpv2"])
def test_the_mlps_options_reach_it(name: str) -> None:
    module = projector(name, ratio=1, act="gelu_tanh", bias=False)
    assert module.linear_1.bias is None
    assert module.act.approximate == "tanh"
    assert module.options() == {"ratio": 1, "out_grid": None, "act": "gelu_tanh", "bias": False}
    with pytest.raises(ValueError, match="act='relu'"):
        projector(name, act="relu")


# M3


def test_a_budget_of_m3_chooses_the_grid() -> None:
    module = projector("matryoshka", ratio=4)
    module.load_state_dict(projector("mlp").state_dict())
    given = random_features((24, 24))
    tokens = projector("mlp")(given)
    for budget, side in {1: 24, 9: 8, 36: 4, 144: 2, 576: 1}.items():
        module.set_budget(budget)
        assert math.prod(module.out_grid((24, 24))) == budget
        same(module(given), sequence(F.avg_pool2d(image(tokens, (24, 24)), side)), 1e-6)
    module.set_budget(None)
    assert module.out_grid((24, 24)) == (12, 12)


def test_budgets_of_m3_nest() -> None:
    module, given = projector("matryoshka"), random_features((24, 24))

    def tokens(budget: int) -> Tensor:
        module.set_budget(budget)
        return module(given)

    same(average_pooled(tokens(144), (12, 12), (6, 6)), tokens(36), 1e-6)
    same(average_pooled(tokens(144), (12, 12), (4, 4)), tokens(16), 1e-6)
    same(tokens(9).mean(1, keepdim=True), tokens(1), 1e-6)
    same(tokens(144), average_pooled(tokens(576), (24, 24), (12, 12)), 1e-6)


@pytest.mark.parametrize("budget", [25, 49, 100, 121, 200, 256, 300])
def test_a_budget_of_m3_is_never_rounded(budget: int) -> None:
    module = projector("matryoshka", ratio=4)
    module.set_budget(budget)
    with pytest.raises(ValueError, match=rf"budget={budget}: .*24x24 nest into 1, 4, 9, 16, 36, 64, 144, 576"):
        module.out_grid((24, 24))


def test_budgets_of_m3_on_other_grids() -> None:
    assert nested_grids((24, 36)) == {864: (24, 36), 216: (12, 18), 96: (8, 12), 54: (6, 9), 24: (4, 6), 6: (2, 3)}
    assert sorted(nested_grids((27, 27))) == [1, 9, 81, 729]
    module = projector("matryoshka")
    module.set_budget(144)
    with pytest.raises(ValueError, match="27x27 nest into 1, 9, 81, 729"):
        module(random_features((27, 27)))
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="tokens="):
            module.set_budget(wrong)
    assert module.budget == 144


# Checkpoints


@pytest.mark.parametrize("module_class", [MLP, AdaptiveAvgPool, Matryoshka, PixelShuffle, LDP, LDPv2, CAbstractor, STF])
def test_a_weight_of_another_module_is_an_error(module_class: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown weight 'model.mm_projector.linear.weight'"):
        module_class.import_state_dict({"model.mm_projector.linear.weight": torch.zeros(1, 1)})
