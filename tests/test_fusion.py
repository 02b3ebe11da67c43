"""The table of fusions: each against its definition, with every interaction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import visible_cells
from vision_remember import FUSIONS, INTERACTIONS, VisionRemember, VisionRememberConfig, build_interaction
from vision_remember.grid import Grid
from vision_remember.interactions import Interaction
from vision_remember.interactions.fusion import MBTF, Mix

D, LEVELS, WIDTH = 16, 3, 8
C = LEVELS * WIDTH
EVEN: tuple[Grid, Grid] = ((4, 6), (8, 12))
UNEVEN: tuple[Grid, Grid] = ((4, 5), (7, 9))

every_interaction = pytest.mark.parametrize("interaction", INTERACTIONS)
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)
every_pair_of_grids = pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=["even", "uneven"])


def build(interaction: str, fusion: str, **options: Any) -> Interaction[Any]:
    """Away from the start, where some weights are zero or alike."""
    torch.manual_seed(0)
    options = {"num_levels": LEVELS, "zero_init": False, **options}
    module = build_interaction(interaction, D, C, fusion=fusion, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def image(token_grid: Grid, feature_grid: Grid, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    cells = math.prod(feature_grid)
    return {
        "tokens": torch.randn(batch, math.prod(token_grid), D, generator=generator, dtype=torch.float64),
        "features": [torch.randn(batch, cells, WIDTH, generator=generator, dtype=torch.float64) for _ in range(LEVELS)],
        "token_grid": token_grid,
        "feature_grid": feature_grid,
        "saliency": torch.rand(batch, cells, generator=generator, dtype=torch.float64),
    }


def normed(levels: list[Tensor]) -> list[Tensor]:
    return [(x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() for x in levels]


def attended(module: Any, keys: list[Tensor], values: list[Tensor], bias: Tensor | None = None, **given: Any) -> Tensor:
    """The update, by a loop over tokens and heads and one softmax over the keys of all visible cells.

    Args:
        module: the interaction, for its query and output projections.
        keys: (H*W, A) for one image, one entry per key that a cell has.
        values: likewise, without saliency.
        bias: (entries, heads, H*W) logits to add for the first token's cells; None for none.
        given: what :func:`image` made, of one image.
    """
    (tokens,), (saliency,) = given["tokens"], given["saliency"]
    seen = torch.ones(len(tokens), len(saliency), dtype=torch.bool)
    if type(module).__name__ == "SELA":
        seen = visible_cells(given["token_grid"], given["feature_grid"])
    query, size = module.vr_query(tokens), module.attn_dim // module.num_heads
    rows = []
    for i in range(len(tokens)):
        heads = []
        for head in range(module.num_heads):
            part = slice(head * size, (head + 1) * size)
            cells = seen[i].nonzero().squeeze(1)
            logits = torch.cat([key[cells, part] @ query[i, part] / math.sqrt(size) for key in keys])
            if bias is not None:
                logits = logits + bias[:, head].flatten()
            weights = logits.softmax(0).split(len(cells))
            heads.append(
                sum((w * saliency[cells]) @ value[cells, part] for w, value in zip(weights, values, strict=True))
            )
        rows.append(torch.cat(heads))
    return module.vr_out(torch.stack(rows))


@every_pair_of_grids
@pytest.mark.parametrize("interaction", ["sela", "global"])
def test_tokens_are_further_keys_of_the_same_cells(interaction: str, grids: tuple[Grid, Grid]) -> None:
    options = {"position": "none"} if interaction == "sela" else {}
    module: Any = build(interaction, "tokens", **options)
    given = image(*grids, batch=1)
    levels = normed([level[0] for level in given["features"]])
    keys, values = (
        [linear(x) for linear, x in zip(stack.levels, levels, strict=True)]
        for stack in (module.vr_key, module.vr_value)
    )
    expected = attended(module, keys, values, **given)
    torch.testing.assert_close(module(**given)[0], expected, rtol=0, atol=1e-10)


def test_each_level_has_a_position_table_of_its_own() -> None:
    """On even grids the logits' bias is the table itself, entry by entry."""
    module: Any = build("sela", "tokens", num_heads=2)
    given = image(*EVEN, batch=1)
    levels = normed([level[0] for level in given["features"]])
    keys, values = (
        [linear(x) for linear, x in zip(stack.levels, levels, strict=True)]
        for stack in (module.vr_key, module.vr_value)
    )
    table = module.position.reshape(LEVELS, 2, 4)
    expected = attended(module, keys, values, bias=table, **given)
    torch.testing.assert_close(module(**given)[0], expected, rtol=0, atol=1e-10)
    weights = module.attention_weights(given["tokens"], given["features"], token_grid=EVEN[0], feature_grid=EVEN[1])
    assert weights.shape[-1] == math.prod(EVEN[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_heads_start_on_their_own_cell_on_every_level() -> None:
    torch.manual_seed(0)
    module: Any = build_interaction("sela", D, C, num_levels=LEVELS, fusion="tokens", num_heads=4)
    table = module.position.reshape(LEVELS, 4, 4)
    assert torch.equal(table, table[:1].expand_as(table))
    assert torch.equal(table[0].argmax(-1), torch.arange(4))


@every_pair_of_grids
@pytest.mark.parametrize("interaction", ["sela", "global"])
@pytest.mark.parametrize("fusion", ["mix", "mbtf"])
def test_one_level_is_made_of_all(fusion: str, interaction: str, grids: tuple[Grid, Grid]) -> None:
    options = {"position": "none"} if interaction == "sela" else {}
    module: Any = build(interaction, fusion, **options)
    given = image(*grids, batch=1)
    levels = normed([level[0] for level in given["features"]])
    if fusion == "mix":
        powers = module.fusion.logits.exp()
        fused = sum(power / powers.sum(0) * level for power, level in zip(powers, levels, strict=True))
    else:
        hidden = torch.cat(levels, -1) @ module.fusion.vr_in.weight.T + module.fusion.vr_in.bias
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        fused = hidden @ module.fusion.vr_out.weight.T + module.fusion.vr_out.bias
    assert fused.shape[-1] == WIDTH
    expected = attended(module, [module.vr_key(fused)], [module.vr_value(fused)], **given)
    torch.testing.assert_close(module(**given)[0], expected, rtol=0, atol=1e-10)


@every_pair_of_grids
@pytest.mark.parametrize("fusion", ["mix", "mbtf"])
def test_deformable_attention_samples_the_fused_level_alone(fusion: str, grids: tuple[Grid, Grid]) -> None:
    module: Any = build("deformable", fusion)
    alone: Any = build_interaction("deformable", D, WIDTH, feature_norm="none", zero_init=False).double()
    own = {k: x for k, x in module.state_dict().items() if not k.startswith("fusion.")}
    alone.load_state_dict(own, strict=True)
    given = image(*grids)
    fused = module.fusion(given["features"])
    torch.testing.assert_close(module(**given), alone(**{**given, "features": fused}))


def test_deformable_attention_takes_levels_one_by_one_as_it_is() -> None:
    given = image(*UNEVEN)
    assert torch.equal(build("deformable", "tokens")(**given), build("deformable", "concat")(**given))


def test_a_mix_starts_as_the_mean_of_the_levels() -> None:
    levels = image(*EVEN)["features"]
    fused = Mix((WIDTH,) * LEVELS, "per_level").double()(levels)
    torch.testing.assert_close(fused, torch.stack(normed(levels)).mean(0))


def test_mbtf_without_norm_has_the_release_s_sizes() -> None:
    """Eight levels of 1024: 8C -> 4C -> C, 37,753,856 weights."""
    with torch.device("meta"):
        fusion = MBTF((1024,) * 8, "none")
    assert sum(parameter.numel() for parameter in fusion.parameters()) == 37_753_856
    assert fusion.out_dims == (1024,)


@every_fusion
def test_gradients_are_those_of_finite_differences(fusion: str) -> None:
    torch.manual_seed(0)
    module = FUSIONS[fusion]((3, 3), "joint").double()
    linear = module.linear(2).double()
    levels = [torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *x: linear(module(list(x))), levels)


@every_fusion
@every_interaction
def test_every_parameter_learns(interaction: str, fusion: str) -> None:
    module, given = build(interaction, fusion), image(*UNEVEN)
    module(**given).square().sum().backward()
    assert not [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_fusion
@every_interaction
def test_a_new_block_is_an_exact_identity(interaction: str, fusion: str, dtype: torch.dtype) -> None:
    config = VisionRememberConfig(interaction=interaction, fusion=fusion)
    assert VisionRememberConfig.from_json(config.to_json()) == config
    block = VisionRemember.from_config(config, D, C, num_levels=LEVELS).to(dtype)
    assert block.interaction.fusion.__class__ is FUSIONS[fusion]
    given = image(*UNEVEN)
    given["tokens"] = given["tokens"].to(dtype)
    assert torch.equal(block(**given), given["tokens"])


@every_fusion
@every_interaction
def test_compiles_without_graph_breaks(interaction: str, fusion: str) -> None:
    module, given = build(interaction, fusion), image(*UNEVEN)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given), module(**given))


@every_interaction
def test_an_unknown_fusion_is_an_error_with_a_suggestion(interaction: str) -> None:
    config = VisionRememberConfig(interaction=interaction, fusion="token")
    with pytest.raises(ValueError, match="unknown fusion 'token': did you mean 'tokens'"):
        VisionRemember.from_config(config, D, C, num_levels=LEVELS)


@every_fusion
@every_interaction
def test_linear_layers_have_no_names_that_lora_looks_for(interaction: str, fusion: str) -> None:
    usual = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert not [name for name, _ in build(interaction, fusion).named_modules() if name.endswith(usual)]


def test_the_norm_comes_first() -> None:
    """A level's scale reaches no fusion."""
    given = image(*EVEN)
    for name in FUSIONS:
        module = build("global", name)
        scaled = {**given, "features": [10.0**i * x for i, x in enumerate(given["features"], start=2)]}
        small = {**given, "features": [100 * x for x in given["features"]]}
        torch.testing.assert_close(module(**scaled), module(**small), rtol=1e-4, atol=1e-6)
