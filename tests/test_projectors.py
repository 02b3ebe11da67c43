"""Projectors: every entry of the table, then the paper's pooling."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vision_remember import PROJECTORS, build_projector
from vision_remember.grid import Grid
from vision_remember.projectors import AdaptiveAvgPool, projector_name

KEEP_THE_GRID = {"mlp"}
COMPRESS = [name for name in PROJECTORS if name not in KEEP_THE_GRID]
GRIDS: list[Grid] = [(24, 24), (27, 27), (16, 36), (12, 5), (4, 4), (1, 7), (7, 1), (1, 1)]


# options that make a projector small, or serve any grid, where its defaults do not
OPTIONS: dict[str, dict[str, Any]] = {
    "honeybee_resampler": {"num_layers": 2},
    "qformer": {"hidden_dim": 24, "num_layers": 2, "num_heads": 2},
    "quecc": {"fit": "resize"},
}


def projector(name: str = "adaptive_avg_pool", in_dim: int = 16, out_dim: int = 24, **options: Any) -> Any:
    torch.manual_seed(0)
    module = build_projector(name, in_dim, out_dim, **{**OPTIONS.get(name, {}), **options})
    if module.needs_text:
        module.register_forward_pre_hook(ask, with_kwargs=True)
    return module


def ask(module: Any, args: Any, kwargs: Any) -> Any:
    """The same question to every image."""
    question = torch.linspace(-1, 1, module.text_dim, dtype=args[0].dtype).expand(len(args[0]), -1)
    return args, {"text": question, **kwargs}


def quartering(name: str) -> Any:
    """A projector that makes four cells one token; one that cannot keeps them all."""
    return projector(name, ratio=1 if name in KEEP_THE_GRID else 4).eval()


def features(grid: Grid, module: Any = None) -> Tensor:
    """What the module is given of two images; a width of 16 without one."""
    dim = 16 if module is None else module.feature_dim
    return torch.randn(2, math.prod(grid), dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{"ratio": 1}, {"ratio": 4}, {"ratio": 9}, {"out_grid": (4, 3)}], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", PROJECTORS)
def test_out_grid_is_the_grid_that_forward_returns(name: str, grid: Grid, options: dict[str, Any]) -> None:
    """Or both refuse."""
    module = projector(name, **options)
    try:
        out_grid = module.out_grid(grid)
    except ValueError:
        with pytest.raises(ValueError, match="grid"):
            module(features(grid, module), grid)
        return
    assert module(features(grid, module), grid).shape == (2, math.prod(out_grid), 24)


@pytest.mark.parametrize(
    ("grid", "ratio", "expected"),
    [
        ((24, 24), 4, (12, 12)),
        ((24, 24), 9, (8, 8)),
        ((16, 36), 4, (8, 18)),
        ((24, 24), 1, (24, 24)),
        ((24, 24), None, (24, 24)),
    ],
)
@pytest.mark.parametrize("name", COMPRESS)
def test_the_ratio_counts_features_per_token(name: str, grid: Grid, ratio: int | None, expected: Grid) -> None:
    assert projector(name, ratio=ratio).out_grid(grid) == expected


@pytest.mark.parametrize(("grid", "expected"), [((27, 27), (14, 14)), ((1, 5), (1, 3)), ((24, 25), (12, 13))])
def test_adaptive_avg_pool_rounds_the_ratios_grid_up(grid: Grid, expected: Grid) -> None:
    module = projector(ratio=4)
    assert module.out_grid(grid) == expected
    assert module(features(grid, module), grid).shape[1] == math.prod(expected)


@pytest.mark.parametrize("name", PROJECTORS)
def test_square_features_need_no_grid(name: str) -> None:
    module = quartering(name)
    assert torch.equal(module(features((6, 6), module)), module(features((6, 6), module), (6, 6)))
    with pytest.raises(ValueError, match="pass the grid"):
        module(features((2, 4), module))


@pytest.mark.parametrize("name", PROJECTORS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    module = quartering(name)
    module(features((6, 6), module)).sin().sum().backward()
    idle = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@pytest.mark.parametrize("how", [None, "ratio", "out_grid"])
@pytest.mark.parametrize("name", PROJECTORS)
def test_options_and_state_build_an_equal_projector(name: str, how: str | None) -> None:
    served = {"ratio": 1, "out_grid": (6, 6)} if name in KEEP_THE_GRID else {"ratio": 4, "out_grid": (3, 3)}
    module = projector(name, **{option: value for option, value in served.items() if option == how}).eval()
    assert projector_name(module) == name
    again = projector(projector_name(module), module.in_dim, module.out_dim, **module.options()).eval()
    assert set(module.options()) <= set(inspect.signature(type(module)).parameters)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(features((6, 6), module)), module(features((6, 6), module)))
    assert again.options() == module.options()


@pytest.mark.parametrize("name", PROJECTORS)
def test_features_are_left_as_they_were(name: str) -> None:
    """They are the encoder's hidden states, which others read too."""
    module = quartering(name)
    given = features((6, 6), module)
    before = given.clone()
    module(given)
    assert torch.equal(given, before)


@pytest.mark.parametrize("name", PROJECTORS)
def test_images_of_a_batch_do_not_mix(name: str) -> None:
    module = quartering(name)
    given = features((6, 6), module)
    torch.testing.assert_close(module(given), torch.cat([module(image) for image in given.split(1)]))


@pytest.mark.parametrize("name", [name for name, cls in PROJECTORS.items() if cls.spatial])
def test_tokens_of_a_spatial_projector_stand_where_their_cells_do(name: str) -> None:
    """A change in a corner of the image changes the tokens of that corner, in the mean where they read beyond it."""
    module, grid = quartering(name), (8, 12)
    h, w = module.out_grid(grid)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        given = features(grid, module)
        plain = module(given, grid)
        rows, columns = (slice(-2, None) if far else slice(2) for far in (down, right))
        given.unflatten(1, grid)[:, rows, columns] += 5
        change = (module(given, grid) - plain).abs().sum(-1).unflatten(1, (h, w))
        row = (change.sum(2) @ torch.linspace(0, 1, h)) / change.sum((1, 2))
        column = (change.sum(1) @ torch.linspace(0, 1, w)) / change.sum((1, 2))
        assert ((row - down).abs() < 0.45).all()
        assert ((column - right).abs() < 0.45).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PROJECTORS)
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    module = quartering(name).to(dtype)
    assert module(features((6, 6), module).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "adaptive_avg_pool" else pytest.mark.slow) for name in PROJECTORS]
)
def test_compiles_without_graph_breaks(name: str) -> None:
    module = quartering(name)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features((4, 6), module), (4, 6)), module(features((4, 6), module), (4, 6)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 4, "out_grid": (2, 2)}, "not both"),
        ({"ratio": 5}, "ratio=5: expected the square"),
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": -4}, "ratio=-4"),
        ({"ratio": 4.0}, "ratio=4.0"),
        ({"ratio": "4"}, "ratio='4'"),
        ({"ratio": True}, "ratio=True"),
        ({"out_grid": (0, 2)}, "out_grid="),
        ({"out_grid": (2,)}, "out_grid="),
        ({"ratoi": 4}, "did you mean 'ratio'"),
    ],
)
@pytest.mark.parametrize("name", PROJECTORS)
def test_options_that_do_not_fit_are_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        projector(name, **options)


COUNTS = [
    (name, option)
    for name, cls in PROJECTORS.items()
    for option, parameter in inspect.signature(cls).parameters.items()
    if parameter.annotation in ("int", "int | None") and option != "ratio"
]
MAY_BE_NONE_AT_ALL = {("c_abstractor", "depth"), ("deformable_pool", "num_layers")}


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"], ids=repr)
@pytest.mark.parametrize(("name", "option"), COUNTS)
def test_counts_and_widths_are_whole_numbers(name: str, option: str, wrong: Any) -> None:
    """Zero must not pass for an option that was left out."""
    if wrong == 0 and ((name, option) in MAY_BE_NONE_AT_ALL or option == "end_tokens"):
        assert projector(name, **{option: 0}).options()[option] == 0
        return
    with pytest.raises(ValueError, match=f"{option}={wrong!r}: expected a"):
        PROJECTORS[name](**{"in_dim": 16, "out_dim": 24, **OPTIONS.get(name, {}), option: wrong})


@pytest.mark.parametrize(
    ("cells", "too_wide", "grid", "message"),
    [
        ((2, 36), 1, None, r"features \(2, 36, {wide}\).*{width}"),
        ((36,), 0, None, r"features \(36, {width}\)"),
        ((2, 36), 0, (6, 5), "36 positions.*6x5.*30"),
        ((2, 36), 0, (0, 6), r"grid=\(0, 6\): expected"),
        ((2, 36), 0, 6, "grid=6: expected"),
        ((2, 4), 0, (1, 4), "out_grid=2x2.*1x4"),
    ],
)
@pytest.mark.parametrize("name", PROJECTORS)
def test_features_that_do_not_fit_are_errors(
    name: str, cells: tuple[int, ...], too_wide: int, grid: Grid | None, message: str
) -> None:
    module = projector(name, out_grid=(2, 2))
    width = module.feature_dim
    with pytest.raises(ValueError, match=message.format(width=width, wide=width + 1)):
        module(torch.zeros(*cells, width + too_wide), grid)


def test_an_unknown_projector_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="unknown projector 'adaptive_pool': did you mean 'adaptive_avg_pool'"):
        projector("adaptive_pool")


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("grid", "out_grid"), [((24, 24), (12, 12)), ((27, 27), (13, 13)), ((5, 8), (3, 8))])
def test_adaptive_avg_pool_is_pytorchs_pooling_and_an_mlp(grid: Grid, out_grid: Grid, bias: bool, act: Any) -> None:
    module = projector(out_grid=out_grid, act=act, bias=bias)
    raster = features(grid).transpose(1, 2).reshape(2, 16, *grid)
    pooled = F.adaptive_avg_pool2d(raster, out_grid).flatten(2).transpose(1, 2)
    state = module.state_dict()
    hidden = F.linear(pooled, state["linear_1.weight"], state.get("linear_1.bias"))
    hidden = F.gelu(hidden, approximate="tanh" if act == "gelu_tanh" else "none")
    expected = F.linear(hidden, state["linear_2.weight"], state.get("linear_2.bias"))
    assert ("linear_2.bias" in state) == bias
    torch.testing.assert_close(module(features(grid), grid), expected)


def test_adaptive_avg_pool_keeps_rows_and_columns_apart() -> None:
    """Features that differ from row to row alone make tokens that do."""
    module = projector(ratio=4)
    rows = torch.arange(4.0).repeat_interleave(6)[None, :, None].expand(1, 24, 16)
    tokens = module(rows, (4, 6)).unflatten(1, (2, 3))
    assert torch.equal(tokens, tokens[:, :, :1].expand_as(tokens))
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])


@pytest.mark.parametrize(("out_dim", "count"), [(896, 1_722_112), (4096, 20_979_712)])
def test_adaptive_avg_pool_has_the_parameters_of_llavas_projector(out_dim: int, count: int) -> None:
    with torch.device("meta"):
        module = AdaptiveAvgPool(1024, out_dim, ratio=4)
    assert sum(p.numel() for p in module.parameters()) == count


def test_a_projector_of_llava_loads_into_adaptive_avg_pool_and_computes_the_same() -> None:

    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(hidden_size=16, num_attention_heads=2),
        text_config=hf.LlamaConfig(hidden_size=24, num_attention_heads=2),
    )
    llavas: nn.Module = LlavaMultiModalProjector(config)
    module = projector()
    module.load_state_dict(llavas.state_dict(), strict=True)
    torch.testing.assert_close(module(features((4, 4))), llavas(features((4, 4))))
