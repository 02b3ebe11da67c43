"""Projectors that attend or sample, against the modules that others compute the same with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference import visible_cells
from vision_remember import build_projector
from vision_remember.grid import Grid
from vision_remember.projectors.attention import Attention, unfused_attention
from vision_remember.projectors.quecc import QueCC
from vision_remember.projectors.token_packer import TokenPacker, hd_layout, hd_token_count

C, D = 16, 24


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(module: Any) -> Any:
    """The module with every parameter moved off its start, so that none hides."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return module.eval()


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("token_packer", {"ratio": 4}, (17_465_088, 36_722_688)),
        ("token_packer", {"ratio": 16}, (17_465_088, 36_722_688)),
        ("quecc", {"ratio": 4}, (19_441_408, 41_975_808)),
        ("quecc", {"ratio": 16}, (19_453_696, 41_988_096)),
        ("resampler", {"out_grid": (12, 12)}, (5_069_568, 88_711_168)),
        ("qformer", {"out_grid": (4, 8)}, (102_312_320, 104_773_120)),
        ("d_abstractor", {"out_grid": (12, 12)}, (52_664_032, 55_944_032)),
    ],
)
def test_parameter_counts(name: str, options: dict[str, Any], counts: tuple[int, int]) -> None:
    with torch.device("meta"):
        modules = [build_projector(name, 1024, out_dim, **options) for out_dim in (896, 4096)]
    assert tuple(sum(p.numel() for p in module.parameters()) for module in modules) == counts


@pytest.mark.parametrize("name", ["token_packer", "quecc", "resampler", "qformer", "d_abstractor", "deformable_pool"])
def test_heads_that_do_not_divide_the_width_are_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"num_heads=7 must divide the attention width \d+"):
        build_projector(name, C, D, num_heads=7)


# attention of four linear layers


def multihead(width: int, heads: int) -> nn.MultiheadAttention:
    return shaken(nn.MultiheadAttention(width, heads, batch_first=True))


def test_attention_equals_pytorchs() -> None:
    theirs, ours = multihead(C, 4), Attention(C, 4)
    ours.load_state_dict({k[2:]: v for k, v in unfused_attention(theirs_state(theirs), "a", "b").items()})
    query, key, value = draw(2, 5, C), draw(2, 7, C, seed=1), draw(2, 7, C, seed=2)
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0])


def test_attention_starts_as_pytorchs_does() -> None:
    torch.manual_seed(0)
    theirs, ours = nn.MultiheadAttention(512, 8), Attention(512, 8)
    torch.testing.assert_close(ours.query.weight.std(), theirs.in_proj_weight.std(), rtol=0.02, atol=0)
    assert not any(linear.bias.any() for linear in (ours.query, ours.key, ours.value, ours.out))


def theirs_state(attention: nn.MultiheadAttention) -> dict[str, Tensor]:
    return {f"a.{name}": weight for name, weight in attention.state_dict().items()}


@pytest.mark.parametrize("name", ["token_packer", "quecc", "resampler", "qformer", "d_abstractor"])
def test_a_layer_put_around_the_output_projection_is_called(name: str) -> None:
    """What ``nn.MultiheadAttention`` fails at: LoRA, quantisation and sharding work this way."""
    options = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8} if name == "qformer" else {}
    module = build_projector(name, C, D, ratio=4, **options).eval()
    given = [draw(1, 16, module.feature_dim)]
    text = {"text": draw(1, D)} if module.needs_text else {}
    before = module(*given, **text)
    attention = next(m for m in module.modules() if isinstance(m, Attention))
    attention.out = nn.Sequential(attention.out, nn.Linear(attention.out.out_features, attention.out.out_features))
    assert not torch.allclose(module(*given, **text), before)


# TokenPacker


def released_token_packer() -> dict[str, Tensor]:
    """Random weights under the names of TokenPacker's release."""
    shapes = {"q_proj_1.weight": (C, C), "mlp.0.weight": (D, C), "mlp.0.bias": (D,)}
    shapes |= {"mlp.2.weight": (D, D), "mlp.2.bias": (D,)}
    for x in "kv":
        shapes |= {f"{x}_proj_1.0.weight": (C, 4 * C), f"{x}_proj_1.2.weight": (C, C)}
        shapes |= {f"{x}_proj_1.0.bias": (C,), f"{x}_proj_1.2.bias": (C,)}
    shapes |= {f"ln_{x}_1.{part}": (C,) for x in "qkv" for part in ("weight", "bias")}
    shapes |= {"clip_attn.in_proj_weight": (3 * C, C), "clip_attn.in_proj_bias": (3 * C,)}
    shapes |= {"clip_attn.out_proj.weight": (C, C), "clip_attn.out_proj.bias": (C,)}
    return {name: draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def cells_of(raster: Tensor, grid: Grid, side: int) -> Tensor:
    """(B, H*W, E) -> (B*h*w, side**2, E), the cells of each block row by row."""
    width = raster.shape[2]
    unfolded = F.unfold(raster.transpose(1, 2).unflatten(2, grid), side, stride=side)  # (B, E*side**2, h*w)
    return unfolded.unflatten(1, (width, side * side)).permute(0, 3, 2, 1).reshape(-1, side * side, width)


def perceptron(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"]))
    return F.linear(hidden, state[f"{name}.2.weight"], state[f"{name}.2.bias"])


@pytest.mark.parametrize(("grid", "side"), [((4, 6), 2), ((6, 9), 3), ((8, 4), 4)])
def test_token_packer_is_its_release(grid: Grid, side: int) -> None:
    state = released_token_packer()
    module = TokenPacker(C, D, ratio=side * side)
    module.load_state_dict(module.import_state_dict(state), strict=True)
    given = draw(2, math.prod(grid), 4 * C, seed=99)

    def norm(x: Tensor, letter: str) -> Tensor:
        return F.layer_norm(x, (C,), state[f"ln_{letter}_1.weight"], state[f"ln_{letter}_1.bias"], 1e-6)

    attention = nn.MultiheadAttention(C, 8, batch_first=True)
    attention.load_state_dict({k.removeprefix("clip_attn."): v for k, v in state.items() if k.startswith("clip")})
    blocks = cells_of(given[..., -C:], grid, side)  # the last level
    middle = [i for i in range(side) if abs(i - (side - 1) / 2) < 1]  # one row or column, or two
    coarse = blocks.unflatten(1, (side, side))[:, middle][:, :, middle].mean((1, 2)).unsqueeze(1)
    query = norm(F.linear(coarse, state["q_proj_1.weight"]), "q")
    key, value = (norm(perceptron(state, f"{x}_proj_1", given), x) for x in "kv")
    read = attention(query, cells_of(key, grid, side), cells_of(value, grid, side))[0]
    expected = perceptron(state, "mlp", read.reshape(2, -1, C))
    torch.testing.assert_close(module(given, grid), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["token_packer", "quecc"])
@pytest.mark.parametrize(("grid", "out_grid"), [((4, 6), (2, 3)), ((9, 9), (5, 5)), ((5, 8), (3, 3))])
def test_a_change_in_the_earlier_levels_of_a_cell_reaches_its_own_tokens_only(
    name: str, grid: Grid, out_grid: Grid
) -> None:
    options = {"fit": "resize"} if name == "quecc" else {}
    module = shaken(build_projector(name, C, D, out_grid=out_grid, **options))
    text = {"text": draw(1, D)} if module.needs_text else {}
    given = draw(1, math.prod(grid), 4 * C)
    plain, sees = module(given, grid, **text), visible_cells(out_grid, grid)
    for cell in range(math.prod(grid)):
        other = given.clone()
        other[:, cell, :C] += 5
        changed = (module(other, grid, **text) - plain)[0].abs().amax(-1) > 1e-6
        assert torch.equal(changed, sees[:, cell])


def test_token_packers_query_is_the_centre_cell_where_three_cells_make_one() -> None:
    """The corners' main level matters for keys and values alone, here switched off."""
    module = shaken(TokenPacker(C, D, ratio=9))
    with torch.no_grad():
        module.key[0].weight[:, -C:] = module.value[0].weight[:, -C:] = 0
    given = draw(1, 36, 4 * C)
    for cell, matters in ((0, False), (7, True), (8, False), (10, True)):
        other = given.clone()
        other[:, cell, -C:] += 5
        assert torch.allclose(module(other), module(given), atol=1e-6) != matters


@pytest.mark.parametrize("name", ["token_packer", "quecc"])
def test_of_constant_features_nothing_but_their_value_is_left(name: str) -> None:
    """Neither the query nor the question can choose between equal cells."""
    module = shaken(build_projector(name, C, D, ratio=4))
    given = draw(1, 1, 4 * C).expand(1, 16, -1)
    read = module.attention.out(module.attention.value(module.value_norm(module.value(given[:, :1]))))
    for seed in range(2):
        text = {"text": draw(1, D, seed=seed)} if module.needs_text else {}
        torch.testing.assert_close(module(given, **text), module.mlp(read).expand(1, 4, -1))


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ((336, 336), (1, 1)),
        ((480, 640), (2, 3)),
        ((672, 672), (3, 3)),
        ((1080, 1920), (2, 4)),
        ((1000, 1000), (3, 3)),
        ((2000, 300), (7, 1)),
    ],
)
def test_hd_layouts(size: Grid, layout: Grid) -> None:
    assert hd_layout(size) == layout


def test_an_image_without_pixels_has_no_layout() -> None:
    with pytest.raises(ValueError, match="image_size="):
        hd_layout((0, 336))
    with pytest.raises(ValueError, match="max_tiles=0"):
        hd_layout((336, 336), max_tiles=0)


@pytest.mark.parametrize(("layout", "count"), [((1, 1), 145), ((2, 2), 725), ((3, 3), 1450), ((2, 4), 1305)])
def test_hd_token_counts(layout: Grid, count: int) -> None:
    assert hd_token_count(layout, 144) == count


# QueCC


def quecc(**options: Any) -> QueCC:
    torch.manual_seed(0)
    return shaken(QueCC(C, D, **options))


@pytest.mark.parametrize(("grid", "side"), [((4, 6), 2), ((8, 4), 4)])
def test_quecc_is_attention_of_condensed_blocks_to_their_cells(grid: Grid, side: int) -> None:
    module = quecc(ratio=side * side, text_dim=10)
    given, text = draw(2, math.prod(grid), 4 * C), draw(2, 10, seed=1)
    state: Any = module.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (C,), state[f"{name}_norm.weight"], state[f"{name}_norm.bias"], 1e-6)

    asked = norm(F.linear(text, state["question.weight"], state["question.bias"]), "question")
    blocks = cells_of(norm(perceptron(state, "query", given[..., -C:] + asked[:, None]), "query"), grid, side)
    query = torch.einsum("nkc,ck->nc", blocks, state["condense.weight"].flatten(1)) + state["condense.bias"]
    attention = nn.MultiheadAttention(C, 8, batch_first=True)
    names = ("query", "key", "value")
    fused = {
        f"in_proj_{part}": torch.cat([state[f"attention.{n}.{part}"] for n in names]) for part in ("weight", "bias")
    }
    out = {f"out_proj.{part}": state[f"attention.out.{part}"] for part in ("weight", "bias")}
    attention.load_state_dict({**fused, **out})
    key, value = (cells_of(norm(perceptron(state, x, given), x), grid, side) for x in ("key", "value"))
    read = attention(query[:, None], key, value)[0].reshape(2, -1, C)
    torch.testing.assert_close(module(given, grid, text=text), perceptron(state, "mlp", read), rtol=1e-4, atol=1e-4)


def test_the_question_changes_every_token_of_its_own_image() -> None:
    module, given, text = quecc(ratio=4), draw(2, 16, 4 * C), draw(2, D)
    other = text.clone()
    other[1] += draw(D, seed=1)
    change = (module(given, text=other) - module(given, text=text)).abs().amax(-1)
    assert not change[0].any()
    assert change[1].all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"pass text=, \(B, 24\)"),
        (draw(1, D), r"text \(1, 24\).*\(2, 24\)"),
        (draw(2, 1, D), r"text \(2, 1, 24\)"),
    ],
)
def test_a_question_that_is_missing_or_does_not_fit_is_an_error(text: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quecc(ratio=4)(draw(2, 16, 4 * C), text=text)


def test_quecc_says_what_it_cannot_cut_into_blocks() -> None:
    with pytest.raises(ValueError, match=r"out_grid=14x14 of 2x2 blocks.*27x27"):
        quecc(ratio=4).out_grid((27, 27))
    for fit in ("pad", "resize"):
        assert quecc(ratio=4, fit=fit).out_grid((27, 27)) == (14, 14)
    assert quecc(out_grid=(2, 3), block=(3, 2)).out_grid((6, 6)) == (2, 3)


def released_quecc(side: int, text_dim: int) -> dict[str, Tensor]:
    """Random weights under the names of QueCC's release."""
    shapes: dict[str, tuple[int, ...]] = {"q_downsample.weight": (C, 1, side, side), "q_downsample.bias": (C,)}
    for letter, width in (("q", C), ("k", 4 * C), ("v", 4 * C)):
        shapes |= {f"{letter}_proj.0.weight": (C, width), f"{letter}_proj.2.weight": (C, C)}
        shapes |= {f"{letter}_proj.{i}.bias": (C,) for i in (0, 2)}
        shapes |= {f"{letter}_proj.3.{part}": (C,) for part in ("weight", "bias")}
    shapes |= {"text_projection.0.weight": (C, text_dim), "text_projection.0.bias": (C,)}
    shapes |= {f"text_projection.1.{part}": (C,) for part in ("weight", "bias")}
    shapes |= {"clip_attn.in_proj_weight": (3 * C, C), "clip_attn.in_proj_bias": (3 * C,)}
    shapes |= {"clip_attn.out_proj.weight": (C, C), "clip_attn.out_proj.bias": (C,)}
    shapes |= {"mm_projector.0.weight": (D, C), "mm_projector.2.weight": (D, D)}
    shapes |= {f"mm_projector.{i}.bias": (D,) for i in (0, 2)}
    return {name: draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize(("grid", "side"), [((4, 6), 2), ((6, 3), 3)])
def test_quecc_is_its_release(grid: Grid, side: int) -> None:
    state = released_quecc(side, text_dim=10)
    module = QueCC(C, D, ratio=side * side, text_dim=10)
    module.load_state_dict(module.import_state_dict(state), strict=True)
    given, text = draw(2, math.prod(grid), 4 * C, seed=98), draw(2, 10, seed=99)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (C,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    asked = F.linear(text, state["text_projection.0.weight"], state["text_projection.0.bias"])
    mixed = given[..., -C:] + norm(asked, "text_projection.1")[:, None]
    raster = norm(perceptron(state, "q_proj", mixed), "q_proj.3").transpose(1, 2).unflatten(2, grid)
    query = F.conv2d(raster, state["q_downsample.weight"], state["q_downsample.bias"], stride=side, groups=C)
    attention = nn.MultiheadAttention(C, 8, batch_first=True)
    attention.load_state_dict({k.removeprefix("clip_attn."): v for k, v in state.items() if k.startswith("clip")})
    key, value = (cells_of(norm(perceptron(state, f"{x}_proj", given), f"{x}_proj.3"), grid, side) for x in "kv")
    read = attention(query.flatten(2).transpose(1, 2).reshape(-1, 1, C), key, value)[0].reshape(2, -1, C)
    expected = perceptron(state, "mm_projector", read)
    torch.testing.assert_close(module(given, grid, text=text), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module_class", [TokenPacker, QueCC])
def test_a_checkpoint_without_attention_is_an_error_that_names_it(module_class: Any) -> None:
    with pytest.raises(ValueError, match=r"no weight 'clip_attn.in_proj_weight'.*the first are none"):
        module_class.import_state_dict({})
    with pytest.raises(ValueError, match=r"unknown weight 'mm_projector.q_proj_1.weight'"):
        module_class.import_state_dict({"mm_projector.q_proj_1.weight": torch.zeros(1)})
