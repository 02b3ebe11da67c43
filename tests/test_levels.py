"""Levels given one by one: the same as joined, without a tensor that holds them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vision_remember import FUSIONS, INTERACTIONS, VisionRemember, VisionRememberConfig, build_interaction
from vision_remember.grid import Grid
from vision_remember.interactions import interaction_options
from vision_remember.interactions.levels import LevelLinear, LevelNorm

D, WIDTHS, UNEQUAL = 16, (8, 8, 8), (6, 10, 4)
EVEN: tuple[Grid, Grid] = ((4, 6), (8, 12))
UNEVEN: tuple[Grid, Grid] = ((4, 5), (7, 9))
NORMS = ("per_level", "joint", "none")

every_interaction = pytest.mark.parametrize("interaction", INTERACTIONS)
# a mix is of levels of one width
every_fusion_of_levels = pytest.mark.parametrize(
    ("fusion", "widths"), [(name, w) for name in FUSIONS for w in (WIDTHS, UNEQUAL) if (name, w) != ("mix", UNEQUAL)]
)
every_norm = pytest.mark.parametrize("feature_norm", NORMS)


def levels_of(widths: Sequence[int], grid: Grid, batch: int = 2) -> list[Tensor]:
    """Levels of quite different scales and means."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, math.prod(grid), width) for width in widths]
    return [
        (3 + 10**i * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def build(interaction: str, widths: Sequence[int] = WIDTHS, **options: Any) -> VisionRemember:
    torch.manual_seed(0)
    options = {"zero_init": False, "level_dims": widths, **options}
    return VisionRemember(D, sum(widths), interaction=interaction, **options).double()


def arguments_for(grids: tuple[Grid, Grid], batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {
        "tokens": torch.randn(batch, math.prod(grids[0]), D, generator=generator, dtype=torch.float64),
        "token_grid": grids[0],
        "feature_grid": grids[1],
        "saliency": torch.rand(batch, math.prod(grids[1]), generator=generator, dtype=torch.float64),
    }


@every_norm
@every_fusion_of_levels
@every_interaction
def test_levels_one_by_one_are_levels_joined(
    interaction: str, fusion: str, widths: tuple[int, ...], feature_norm: str
) -> None:
    module = build(interaction, widths, fusion=fusion, feature_norm=feature_norm)
    levels, arguments = levels_of(widths, UNEVEN[1]), arguments_for(UNEVEN)
    outcomes = []
    for features in (levels, torch.cat(levels, -1), module.prepare(levels, **_image(arguments))):
        given = {**arguments, "saliency": None} if not isinstance(features, list | Tensor) else arguments
        output = module(features=features, **given)
        outcomes.append([output, *torch.autograd.grad(output.sin().sum(), [*levels, *module.parameters()])])
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0], rtol=1e-8, atol=1e-8)


def _image(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in ("feature_grid", "saliency")}


@every_norm
@every_interaction
def test_no_images_are_read_without_a_warning(interaction: str, feature_norm: str) -> None:
    """As in a training step without images, through which the parameters still take part."""
    module = build(interaction, UNEQUAL, feature_norm=feature_norm)
    output = module(features=levels_of(UNEQUAL, (1, 1), batch=0), **arguments_for(((1, 1), (1, 1)), batch=0))
    assert output.shape == (0, 1, D)
    output.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


class Widest(TorchDispatchMode):
    """Keeps the number of elements of the largest float tensor that any operation makes anew."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not func.is_view:
                self.elements = max(self.elements, leaf.numel())
        return result


@every_norm
@pytest.mark.parametrize("fusion", ["concat", "mix"])
@every_interaction
def test_no_tensor_is_made_that_holds_all_levels(interaction: str, fusion: str, feature_norm: str) -> None:
    """The attention is narrow here, so that a tensor as large as the joined features could be nothing else."""
    widths, grids = (64, 64, 64), ((3, 3), (24, 24))
    narrow = {
        name: n for name, n in {"attn_dim": 8, "num_heads": 1}.items() if name in interaction_options(interaction)
    }
    module = build(interaction, widths, fusion=fusion, feature_norm=feature_norm, **narrow)
    levels, arguments = levels_of(widths, grids[1], batch=1), arguments_for(grids, batch=1)
    joined = torch.cat(levels, -1)
    with Widest() as alone:
        module(features=levels, **arguments).sum().backward()
    with Widest() as together:
        module(features=joined, **arguments).sum().backward()
    assert alone.elements < joined.numel() <= together.elements


@every_norm
def test_the_norm_is_layer_norm(feature_norm: Any) -> None:
    levels = levels_of(UNEQUAL, (3, 5))
    joined = torch.cat(levels, -1)
    expected = {
        "per_level": torch.cat([F.layer_norm(level, level.shape[-1:]) for level in levels], -1),
        "joint": F.layer_norm(joined, joined.shape[-1:]),
        "none": joined,
    }[feature_norm]
    norm = LevelNorm(UNEQUAL, feature_norm)
    torch.testing.assert_close(torch.cat(list(norm(levels)), -1), expected)
    given_joined = norm(joined)
    given_joined = given_joined if isinstance(given_joined, Tensor) else torch.cat(list(given_joined), -1)
    torch.testing.assert_close(given_joined, expected)


def test_the_joint_norm_keeps_half_precision_but_counts_in_float32() -> None:
    levels = [level.detach() + 300 for level in levels_of(WIDTHS, (3, 5))]
    low = [level.to(torch.bfloat16) for level in levels]
    normed = LevelNorm(WIDTHS, "joint")(low)
    expected = F.layer_norm(torch.cat(low, -1).float(), (sum(WIDTHS),))
    assert {level.dtype for level in normed} == {torch.bfloat16}
    torch.testing.assert_close(torch.cat(list(normed), -1).float(), expected, rtol=0.01, atol=0.01)


def test_a_linear_layer_sums_the_products_of_levels() -> None:
    linear = LevelLinear(sum(UNEQUAL), 5).double()
    levels = levels_of(UNEQUAL, (3, 5))
    torch.testing.assert_close(linear(levels), F.linear(torch.cat(levels, -1), linear.weight, linear.bias))


@pytest.mark.parametrize("learning", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_over_levels_works_under_autocast(dtype: torch.dtype, learning: bool) -> None:
    linear = LevelLinear(sum(UNEQUAL), 5)
    levels = [torch.randn(2, 6, width).to(dtype) for width in UNEQUAL]
    with torch.set_grad_enabled(learning):
        exact = linear([level.float() for level in levels])
        with torch.autocast("cpu", torch.bfloat16):
            apart, joined = linear(levels), linear(torch.cat(levels, dim=-1))
    assert apart.dtype == joined.dtype == torch.bfloat16
    torch.testing.assert_close(apart.float(), exact, rtol=0.02, atol=0.02)


@every_interaction
def test_the_state_dict_does_not_know_how_levels_come(interaction: str) -> None:
    shapes = {k: x.shape for k, x in build(interaction, level_dims=None, num_levels=3).state_dict().items()}
    assert {k: x.shape for k, x in build(interaction).state_dict().items()} == shapes
    if interaction in ("sela", "global"):
        assert shapes["interaction.vr_key.weight"] == (D, sum(WIDTHS))


def test_a_layer_wrapped_around_a_projection_is_called() -> None:
    """As LoRA does it: the wrapper takes the layer's place and knows one tensor only."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x.clone())

    levels, image = levels_of(WIDTHS, EVEN[1]), {"feature_grid": EVEN[1]}
    module = build_interaction("sela", D, sum(WIDTHS), num_levels=3).double()
    key = module.prepare(levels, **image).key
    module.vr_key = Doubled(module.vr_key)
    torch.testing.assert_close(module.prepare(levels, **image).key, 2 * key)


@every_interaction
def test_one_level_in_a_list_is_that_level(interaction: str) -> None:
    module, arguments = build(interaction), arguments_for(EVEN)
    joined = torch.cat(levels_of(WIDTHS, EVEN[1]), -1)
    assert torch.equal(module(features=[joined], **arguments), module(features=joined, **arguments))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([torch.zeros(2, 96, 8), torch.zeros(2, 96, 16)], r"\(2, 96, 8\), \(2, 96, 16\).*level_dims=\[8, 8, 8\]"),
        ([torch.zeros(2, 96, 8)] * 2 + [torch.zeros(2, 90, 8)], r"\(2, 90, 8\).*one \(B, H\*W, c\) per level"),
        ([torch.zeros(3, 96, 8)] * 3, "2 token grids.*3 images"),
        ([torch.zeros(2, 90, 8)] * 3, "90 positions.*8x12"),
        ([], "2 token grids.*0 images"),
    ],
)
@every_interaction
def test_levels_that_do_not_fit_are_errors(interaction: str, features: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(interaction)(features=features, **arguments_for(EVEN))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level_dims": (8, 8)}, r"level_dims=\[8, 8\].*feature_dim=24"),
        ({"level_dims": (24, 0)}, r"level_dims=\[24, 0\]: expected positive widths"),
        ({"level_dims": (8, 16), "num_levels": 3}, r"level_dims=\[8, 16\]: expected 3"),
        ({"level_dims": (8, 16), "fusion": "mix"}, r"'mix' needs levels of one width"),
        ({"fusion": "concatenate"}, "unknown fusion 'concatenate': did you mean 'concat'"),
    ],
)
@every_interaction
def test_options_that_do_not_fit_are_errors(interaction: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_interaction(interaction, D, 24, **options)


def test_a_configuration_makes_a_block_for_levels_of_unequal_width() -> None:
    config = VisionRememberConfig.from_preset("paper")
    module = VisionRemember.from_config(config, D, sum(UNEQUAL), level_dims=UNEQUAL).double()
    levels, arguments = levels_of(UNEQUAL, EVEN[1]), arguments_for(EVEN)
    torch.testing.assert_close(
        module(features=levels, **arguments), module(features=torch.cat(levels, -1), **arguments)
    )
