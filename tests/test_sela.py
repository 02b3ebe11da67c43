"""SELA: what a token sees, what saliency does, where heads start."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import visible_cells
from vision_remember import SELA
from vision_remember.grid import Grid
from vision_remember.interactions.parts import head_count
from vision_remember.ops import BACKENDS

D, C = 16, 24
EVEN: tuple[Grid, Grid] = ((4, 6), (8, 12))
UNEVEN: tuple[Grid, Grid] = ((4, 5), (7, 9))
ON_CPU = [name for name in BACKENDS if name != "triton"]


def sela(**options: Any) -> SELA:
    torch.manual_seed(0)
    return SELA(D, C, **{"zero_init": False, "num_heads": 4, **options}).double()


def image(token_grid: Grid, feature_grid: Grid, *, batch: int = 2) -> dict[str, Any]:
    """Arguments of a forward call."""
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens": torch.randn(batch, math.prod(token_grid), D, generator=generator, dtype=torch.float64),
        "features": torch.randn(batch, math.prod(feature_grid), C, generator=generator, dtype=torch.float64),
        "token_grid": token_grid,
        "feature_grid": feature_grid,
    }


def some_saliency(feature_grid: Grid) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(2, math.prod(feature_grid), generator=generator, dtype=torch.float64)


def what_is_read(module: SELA, **arguments: Any) -> Tensor:
    """(B, h*w, width), the attention's result in front of the output projection."""
    seen: list[Tensor] = []
    handle = module.vr_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(**arguments)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_a_token_is_changed_by_the_cells_under_its_block_and_no_others(grids: tuple[Grid, Grid], window: int) -> None:
    module, arguments = sela(window=window), image(*grids, batch=1)
    features = arguments.pop("features").requires_grad_()
    update = module(features=features, **arguments)[0]
    gradients = torch.stack([torch.autograd.grad(row.sum(), features, retain_graph=True)[0][0] for row in update])
    assert torch.equal(gradients.abs().sum(-1) > 0, visible_cells(*grids, window))


@pytest.mark.parametrize("window", [1, 2])
def test_blocks_permuted_with_their_cells_give_updates_permuted(window: int) -> None:
    token_grid, feature_grid = EVEN
    module, arguments = sela(window=window), image(*EVEN)
    blocks = (token_grid[0] // window, token_grid[1] // window)
    order = torch.randperm(math.prod(blocks), generator=torch.Generator().manual_seed(3))

    def permuted(x: Tensor, grid: Grid) -> Tensor:
        """(B, positions, dim), the tiles that lie under the blocks shuffled."""
        rows, columns = grid[0] // blocks[0], grid[1] // blocks[1]
        tiles = x.unflatten(1, (blocks[0], rows, blocks[1], columns)).transpose(2, 3).flatten(1, 2)[:, order]
        return tiles.unflatten(1, blocks).transpose(2, 3).flatten(1, 4)

    shuffled = {
        **arguments,
        "tokens": permuted(arguments["tokens"], token_grid),
        "features": permuted(arguments["features"], feature_grid),
    }
    torch.testing.assert_close(module(**shuffled), permuted(module(**arguments), token_grid), rtol=0, atol=1e-12)


@pytest.mark.parametrize("feature_norm", ["per_level", "joint", "none"])
@pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_what_is_read_scales_with_saliency(grids: tuple[Grid, Grid], feature_norm: Any) -> None:
    """So saliency reaches the values alone, behind every norm, and no bias joins in."""
    module, arguments = sela(feature_norm=feature_norm, num_levels=3), image(*grids)
    saliency = some_saliency(grids[1])
    full = what_is_read(module, **arguments, saliency=saliency)
    scaled = what_is_read(module, **arguments, saliency=0.3 * saliency)
    torch.testing.assert_close(scaled, 0.3 * full, rtol=0, atol=1e-12)
    assert not torch.allclose(full, what_is_read(module, **arguments))


def test_saliency_of_one_is_no_saliency() -> None:
    module, arguments = sela(), image(*UNEVEN)
    ones = torch.ones(2, math.prod(UNEVEN[1]))
    assert torch.equal(module(**arguments, saliency=ones), module(**arguments))


def test_saliency_of_one_cell_weights_that_cell_in_every_head() -> None:
    module, arguments = sela(), image(*EVEN)
    weights = module.attention_weights(**arguments)
    saliency = torch.ones(2, math.prod(EVEN[1]), dtype=torch.float64)
    saliency[:, 0] = 0.25
    value = module.prepare(arguments["features"], feature_grid=EVEN[1]).value[:, :, 0]
    lost = what_is_read(module, **arguments) - what_is_read(module, **arguments, saliency=saliency)
    expected = torch.zeros_like(lost)
    expected[:, 0] = (0.75 * weights[:, :, 0, :1] * value).flatten(1)  # the first cell lies under the first token
    torch.testing.assert_close(lost, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", ["specialised", "learned", "none"])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_attention_weights_are_those_that_forward_uses(grids: tuple[Grid, Grid], window: int, position: Any) -> None:
    module, arguments = sela(window=window, position=position), image(*grids)
    weights = module.attention_weights(**arguments)
    assert torch.equal(weights > 0, visible_cells(*grids, window).expand_as(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    value = module.prepare(arguments["features"], feature_grid=grids[1]).value
    read = torch.einsum("bhqk,bhkd->bqhd", weights, value).flatten(2)
    torch.testing.assert_close(read, what_is_read(module, **arguments), rtol=0, atol=1e-12)


def as_printed(module: SELA, tokens: Tensor, features: Tensor, saliency: Tensor) -> Tensor:
    """Section 4.3 for one image with r = 2, token by token and head by head, from the module's weights."""
    cells = nn.functional.layer_norm(features, (C,))
    query, key, value = module.vr_query(tokens), module.vr_key(cells), module.vr_value(cells) * saliency[:, None]
    (h, w), width, size = EVEN[0], EVEN[1][1], module.attn_dim // module.num_heads
    rows = []
    for i in range(h):
        for j in range(w):
            window = [2 * i * width + 2 * j, 2 * i * width + 2 * j + 1, (2 * i + 1) * width + 2 * j]
            window.append(window[-1] + 1)
            heads = [slice(head * size, (head + 1) * size) for head in range(module.num_heads)]
            weights = [(query[i * w + j, s] @ key[window, s].T / math.sqrt(size)).softmax(0) for s in heads]
            rows.append(torch.cat([a @ value[window, s] for a, s in zip(weights, heads, strict=True)]))
    return module.vr_out(torch.stack(rows))


@pytest.mark.parametrize("inner", [False, True])
def test_without_position_it_is_the_attention_printed_in_the_paper(inner: bool) -> None:
    options: dict[str, Any] = {"attn_dim": "features", "query_layers": 2, "output_layers": 2}
    module, arguments = sela(position="none", inner_projections=inner, **options), image(*EVEN)
    saliency = some_saliency(EVEN[1])
    update = module(**arguments, saliency=saliency)
    rows = [as_printed(module, *row) for row in zip(arguments["tokens"], arguments["features"], saliency, strict=True)]
    torch.testing.assert_close(update, torch.stack(rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cells", [(2, 2), (3, 2)])
@pytest.mark.parametrize("window", [1, 2])
def test_each_specialised_head_starts_on_a_cell_of_its_own(window: int, cells: Grid) -> None:
    """With equal keys, head n looks at the n-th of the cells under the token itself, whatever the block."""
    heads = math.prod(cells)
    torch.manual_seed(0)
    module = SELA(24, C, num_heads=heads, window=window, cells=cells)
    token_grid: Grid = (4, 4)
    feature_grid = (4 * cells[0], 4 * cells[1])
    features = torch.ones(1, math.prod(feature_grid), C)
    tokens = torch.randn(1, 16, 24)
    weights = module.attention_weights(tokens, features, token_grid=token_grid, feature_grid=feature_grid)[0]
    strongest = weights.argmax(-1)  # (heads, h*w)
    for token in range(16):
        own = visible_cells(token_grid, feature_grid)[token].nonzero().flatten()
        assert strongest[:, token].tolist() == own.tolist()
    share = math.exp(3) / (math.exp(3) + 3)  # 87 %, however many cells there are
    torch.testing.assert_close(weights.amax(-1), torch.full((heads, 16), share))


@pytest.mark.parametrize(("heads", "starts"), [(2, [0, 1]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 0, 1])])
def test_more_heads_than_cells_begin_again_at_the_first(heads: int, starts: list[int]) -> None:
    position = SELA(48, C, num_heads=heads).position
    assert position.shape == (heads, 1, 2, 2)
    assert position.flatten(1).argmax(-1).tolist() == starts
    by_level = SELA(48, C, num_heads=heads, num_levels=3, fusion="tokens").position.unflatten(0, (3, heads))
    assert torch.equal(by_level, position.expand_as(by_level))


def test_a_learned_position_starts_small_and_different_in_every_place() -> None:
    position = sela(position="learned", window=2).position
    assert 0.01 < position.std() < 0.04
    assert len(position.unique()) == position.numel()


def test_positions_tell_the_tokens_of_a_block_apart() -> None:
    """Equal tokens in one block get different updates, because each starts on its own cells."""
    arguments = image(*EVEN)
    arguments["tokens"] = arguments["tokens"][:, :1].expand_as(arguments["tokens"])
    first_block = [0, 1, 6, 7]
    assert torch.pdist(sela(window=2)(**arguments)[0, first_block]).min() > 1e-3
    alike = sela(window=2, position="none")(**arguments)[0, first_block]
    torch.testing.assert_close(alike, alike[:1].expand_as(alike))


@pytest.mark.parametrize("backend", ON_CPU)
def test_every_backend_gives_the_same_update(backend: str) -> None:
    arguments = image(*UNEVEN)
    expected = sela(window=2, backend="naive")(**arguments)
    torch.testing.assert_close(sela(window=2, backend=backend)(**arguments), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("feature_norm", "factors", "blind"),
    [
        ("per_level", [7.0, 1.0, 1.0], True),
        ("per_level", [7.0, 7.0, 7.0], True),
        ("joint", [7.0, 1.0, 1.0], False),
        ("joint", [7.0, 7.0, 7.0], True),
        ("none", [7.0, 7.0, 7.0], False),
    ],
)
def test_feature_norm_is_blind_to_scale(feature_norm: Any, factors: list[float], blind: bool) -> None:
    module, arguments = sela(feature_norm=feature_norm, num_levels=3), image(*EVEN)
    arguments["features"] *= 100  # so that the norm's epsilon does not show
    before = module(**arguments)
    arguments["features"] *= torch.tensor(factors).repeat_interleave(C // 3)
    assert torch.allclose(module(**arguments), before, atol=1e-5) == blind


def test_the_joint_norm_has_no_weights() -> None:
    names = dict(sela(feature_norm="joint").named_parameters())
    assert not any("norm" in name for name in names)


def test_the_search_for_heads_ends_at_any_width() -> None:
    """Adapter files from strangers may ask for any: here a prime of 19 digits, and as many powers of two."""
    assert head_count(None, 2**61 - 1, 4) == 1
    assert head_count(None, 2**62, 2**63) == 2**62 // 64


@pytest.mark.parametrize(
    ("query_dim", "options", "width", "heads"),
    [
        (896, {}, 896, 14),
        (1536, {}, 1024, 16),
        (3584, {}, 1024, 16),
        (48, {"position": "none"}, 48, 3),
        (48, {}, 48, 4),  # one per cell
        (896, {"cells": (4, 4)}, 896, 16),
        (896, {"cells": (3, 3)}, 896, 14),
        (1024, {"cells": (5, 5)}, 1024, 32),
        (128, {"cells": (3, 3)}, 128, 16),
        (8, {}, 8, 1),  # no room for four heads
        (896, {"attn_dim": "features"}, C, 1),
        (896, {"attn_dim": 512, "num_heads": 2}, 512, 2),
        (514, {}, 514, 2),  # 514 = 2 * 257: no more heads divide it
    ],
)
def test_width_and_heads_by_default(query_dim: int, options: dict[str, Any], width: int, heads: int) -> None:
    module = SELA(query_dim, C, **options)
    assert (module.attn_dim, module.num_heads) == (width, heads)
    assert module.vr_key.out_features == width


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_of_the_projections(layers: Any) -> None:
    module = SELA(D, C, attn_dim="features", query_layers=layers, output_layers=layers)
    for projection in (module.vr_query, module.vr_out):
        assert sum(isinstance(part, nn.Linear) for part in projection.modules()) == layers
    update = module(**{k: v.float() if isinstance(v, Tensor) else v for k, v in image(*EVEN).items()})
    assert update.shape == (2, math.prod(EVEN[0]), D)
    assert not update.any(), "zero_init has to reach the last layer"


def test_inner_projections_are_linear_maps_around_the_attention() -> None:
    """Behind the query and before the output: identities change nothing, and the start is one of no update still."""
    plain, inner = (sela(inner_projections=given, zero_init=False) for given in (False, True))
    width = inner.attn_dim
    assert sum(p.numel() for p in inner.parameters()) - sum(p.numel() for p in plain.parameters()) == 2 * width**2
    state = {**plain.state_dict()}
    for name, theirs in (("vr_query", "vr_query.0"), ("vr_out", "vr_out.1")):
        for kind in ("weight", "bias"):
            state[f"{theirs}.{kind}"] = state.pop(f"{name}.{kind}")
    state["vr_query.1.weight"] = state["vr_out.0.weight"] = torch.eye(width, dtype=torch.float64)
    inner.load_state_dict(state)
    torch.testing.assert_close(inner(**image(*EVEN)), plain(**image(*EVEN)))
    assert not sela(inner_projections=True, zero_init=True)(**image(*EVEN)).any()


def test_linear_layers_have_no_names_that_lora_looks_for() -> None:
    usual = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
    linears = [name for name, m in sela(query_layers=2).named_modules() if isinstance(m, nn.Linear)]
    assert linears
    assert not any(name.endswith(usual) for name in linears)


def test_deepcopies_share_nothing() -> None:
    module = sela()
    copied = copy.deepcopy(module)
    arguments = image(*EVEN)
    assert torch.equal(module(**arguments), copied(**arguments))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert module(**arguments).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide the attention width 16"),
        ({"window": 0}, "window=0"),
        ({"window": -1}, "window=-1"),
        ({"window": 2.0}, "window=2.0"),
        ({"num_heads": 2.0}, "num_heads=2.0"),
        ({"attn_dim": 0}, "attn_dim=0"),
        ({"attn_dim": -16}, "attn_dim=-16"),
        ({"attn_dim": "feature"}, "attn_dim='feature'"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": -2}, "num_heads=-2"),
        ({"cells": (0, 2)}, r"cells=\(0, 2\)"),
        ({"num_levels": 0}, "num_levels=0"),
        ({"num_levels": 5}, "num_levels=5 must divide feature_dim=24"),
        ({"feature_norm": "layer"}, "feature_norm='layer'.*'per_level'"),
        ({"position": "rotary"}, "position='rotary'.*'specialised'"),
        ({"backend": "windwed"}, "did you mean 'windowed'"),
        ({"query_layers": 3}, "3 layers"),
        ({"output_layers": 0}, "0 layers"),
    ],
)
def test_options_that_do_not_fit_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SELA(D, C, **options)
