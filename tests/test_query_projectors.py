"""Projectors with learned queries: the resampler, the Q-Former and their tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from tests.test_attention_projectors import C, D, draw, multihead, shaken
from vision_remember import build_projector
from vision_remember.projectors.honeybee_resampler import HoneybeeResampler
from vision_remember.projectors.qformer import QFormer
from vision_remember.projectors.resampler import Resampler, sincos_positions
from vision_remember.projectors.tables import resampled

# resampler

LN = ("ln_q", "ln_kv", "ln_post")


def resampler(out_dim: int = D, **options: Any) -> Resampler:
    torch.manual_seed(0)
    return shaken(Resampler(C, out_dim, **{"out_grid": (3, 2), "num_heads": 2, **options}))


def test_positions_are_sines_and_cosines_of_column_then_row() -> None:
    table = sincos_positions((3, 5), 8).unflatten(0, (3, 5))
    for i in range(3):
        for j in range(5):
            wanted = [f(place / 10_000**k) for place in (j, i) for f in (math.sin, math.cos) for k in (0, 0.5)]
            torch.testing.assert_close(table[i, j], torch.tensor(wanted))


@pytest.mark.parametrize("prefix", ["", "attn_pool."])
@pytest.mark.parametrize("positions", ["cells", "shared"])
@pytest.mark.parametrize("width", [C, D])
def test_resampler_is_one_cross_attention(width: int, positions: Any, prefix: str) -> None:
    """With weights under the names of Qwen-VL and MiniCPM-V."""
    attention = multihead(width, 2)
    state = {f"{prefix}attn.{name}": weight for name, weight in attention.state_dict().items()}
    state |= {f"{prefix}{name}.{part}": draw(width, seed=i) for i, name in enumerate(LN) for part in ("weight", "bias")}
    state |= {f"{prefix}query": draw(6, width), "proj": draw(width, width), f"{prefix}pos_embed": draw(6, width)}
    if width != C:
        state[f"{prefix}kv_proj.weight"] = draw(width, C)
    module = resampler(width, positions=positions)
    module.load_state_dict(module.import_state_dict(state), strict=True)
    state = {name.removeprefix("attn_pool."): weight for name, weight in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    given, grid = draw(2, 20, C, seed=9), (4, 5)
    value = norm(given @ state["kv_proj.weight"].T if width != C else given, "ln_kv")
    query, key = norm(state["query"], "ln_q"), sincos_positions(grid, width)
    if positions == "shared":
        table = sincos_positions((3, 2), width)
        query, raster = query + table, table.reshape(1, 3, 2, width).permute(0, 3, 1, 2)
        key = F.interpolate(raster, size=grid, mode="bicubic", align_corners=False)[0].flatten(1).T
    read = attention(query.expand(2, -1, -1), value + key, value)[0]
    torch.testing.assert_close(module(given, grid), norm(read, "ln_post") @ state["proj"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["cells", "shared"])
def test_values_carry_no_position(positions: Any) -> None:
    tokens = resampler(positions=positions)(draw(1, 1, C).expand(1, 16, -1))
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens))


def test_keys_know_where_they_are() -> None:
    given = draw(1, 16, C)
    assert not torch.allclose(resampler()(given), resampler()(given.flip(1)), atol=1e-4)


def test_resampler_checks_its_options() -> None:
    with pytest.raises(ValueError, match=r"out_dim=22.*multiple of four"):
        Resampler(C, 22)
    with pytest.raises(ValueError, match="positions='rows': expected 'cells' or 'shared'"):
        resampler(positions="rows")


@pytest.mark.parametrize(("out_dim", "heads"), [(896, 7), (4096, 32), (960, 6), (24, 1)])
def test_a_head_gets_128_channels_or_a_little_more(out_dim: int, heads: int) -> None:
    with torch.device("meta"):
        assert Resampler(C, out_dim).attention.num_heads == heads


# tables of learned queries


def test_a_table_read_on_its_own_grid_is_the_very_table() -> None:
    table = draw(6, 4)
    assert resampled(table, (3, 2), (3, 2)) is table
    torch.testing.assert_close(resampled(table[:1].expand(6, -1), (3, 2), (4, 7)), table[:1].expand(28, -1))


def test_a_table_keeps_rows_and_columns_apart() -> None:
    rows = torch.arange(3.0).repeat_interleave(2)[:, None]
    stretched = resampled(rows, (3, 2), (6, 5)).reshape(6, 5)
    torch.testing.assert_close(stretched, stretched[:, :1].expand(6, 5))
    assert (stretched[1:] > stretched[:-1]).all()


@pytest.mark.parametrize("name", ["resampler", "d_abstractor"])
def test_a_ratio_has_queries_for_every_grid(name: str) -> None:
    module = shaken(build_projector(name, C, D, ratio=4, query_grid=(3, 3)))
    tokens = module(draw(1, 8 * 12, C), (8, 12))[0]
    assert (torch.cdist(tokens, tokens) + torch.eye(24) > 1e-3).all()


# Q-Former


@pytest.fixture(scope="module")
def blip2() -> Any:
    torch.manual_seed(0)
    config = transformers.Blip2Config(
        vision_config={
            "hidden_size": C, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8,
            "image_size": 8, "patch_size": 4,
        },
        qformer_config={
            "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 5, "encoder_hidden_size": C,
            "intermediate_size": 128, "vocab_size": 10,
        },
        text_config={
            "model_type": "opt", "hidden_size": D, "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 8,
            "vocab_size": 20, "word_embed_proj_dim": D,
        },
        num_query_tokens=6,
    )  # fmt: skip
    return shaken(transformers.Blip2ForConditionalGeneration(config))


def qformer(**options: Any) -> QFormer:
    torch.manual_seed(0)
    return shaken(QFormer(C, D, **{"out_grid": (2, 3), "hidden_dim": 32, "num_layers": 5, "num_heads": 4, **options}))


def test_qformer_is_blip2s(blip2: Any) -> None:
    module = qformer()
    module.load_state_dict(module.import_state_dict(blip2.state_dict()), strict=True)
    given = draw(2, 20, C)
    queries = blip2.query_tokens.expand(2, -1, -1)
    read = blip2.qformer(query_embeds=queries, encoder_hidden_states=given).last_hidden_state
    torch.testing.assert_close(module(given, (4, 5)), blip2.language_projection(read), rtol=1e-4, atol=1e-4)


def test_imported_weights_are_the_very_weights(blip2: Any) -> None:
    state = blip2.state_dict()
    imported = QFormer.import_state_dict(state)
    given = {weight.data_ptr() for weight in state.values()}
    assert all(weight.data_ptr() in given for weight in imported.values())


def test_qformer_does_not_care_where_features_are() -> None:
    given, order = draw(2, 16, C), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(qformer()(given[:, order]), qformer()(given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [qformer, resampler])
def test_equal_queries_stay_equal(make: Any) -> None:
    """Why none of them may start at zero."""
    module = make()
    nn.init.zeros_(module.queries)
    tokens = module(draw(1, 16, C))
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens))
    assert type(module)(C, 768, out_grid=(4, 4)).queries.std().item() == pytest.approx(0.02, rel=0.1)


def test_dropout_is_for_training() -> None:
    module, given = qformer(dropout=0.5), draw(1, 16, C)
    assert torch.equal(module(given), module(given))
    assert not torch.equal(module.train()(given), module(given))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no weight 'attn.in_proj_weight'"),
        ({"resampler.ln_q.weight": torch.zeros(1)}, "unknown weight 'resampler.ln_q.weight'"),
    ],
)
def test_a_checkpoint_of_no_resampler_is_an_error_that_names_a_weight(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resampler.import_state_dict(state)


def test_a_resampler_s_checkpoint_needs_queries_and_the_last_matrix() -> None:
    attention = {f"attn.{name}": weight for name, weight in multihead(C, 2).state_dict().items()}
    for missing in ("query", "proj"):
        state = {**attention, "query": draw(6, C), "proj": draw(C, C)}
        del state[missing]
        with pytest.raises(ValueError, match=f"no weight '{missing}': expected .*the first are 'attn.in_proj_weight'"):
            Resampler.import_state_dict(state)


def test_a_blip_2_s_checkpoint_needs_queries() -> None:
    """Everything else may belong to other parts; under another prefix all of it would."""
    with pytest.raises(ValueError, match=r"no weight 'query_tokens': expected .*the first are 'model\.query_tokens'"):
        QFormer.import_state_dict({"model.query_tokens": draw(1, 4, C)})


# Honeybee's resampler

LAYERS = 2


def released_honeybee_resampler(width: int, hidden: int, end: int) -> dict[str, Tensor]:
    """Random weights under the names of Honeybee's release, six queries."""
    shapes: dict[str, tuple[int, ...]] = {"query_tokens": (1, 6, width)}
    linears = {"visual_input_fc": (width, C), "visual_output_fc": (D, width)}
    norms = {}
    for i in range(LAYERS):
        name = f"encoder.layers.{i}.crossattention"
        linears |= {f"{name}.attention.{x}": (width, width) for x in ("query", "key", "value")}
        linears |= {f"{name}.output.out_proj": (width, width), f"{name}.output.mlp.w2": (width, hidden)}
        linears |= {f"{name}.output.mlp.{x}": (hidden, width) for x in ("w1", "w3")}
        norms |= {f"{name}.{x}": width for x in ("norm1", "normk", "output.norm2")}
        norms[f"{name}.output.mlp.ffn_ln"] = hidden
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}
    if end:
        shapes["vit_eos"] = (1, end, D)
    return {name: draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize(("width", "end"), [(C, 0), (24, 2)])
def test_honeybee_s_resampler_is_its_release(width: int, end: int) -> None:
    state, heads = released_honeybee_resampler(width, 20, end), 2
    options = {"hidden_dim": width, "ffn_dim": 20, "num_layers": LAYERS, "num_heads": heads, "end_tokens": end}
    module = HoneybeeResampler(C, D, out_grid=(3, 2), **options)
    module.load_state_dict(module.import_state_dict(state), strict=True)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    given = draw(2, 20, C, seed=99)
    memory, queries = linear(given, "visual_input_fc"), state["query_tokens"].expand(2, -1, -1)
    for i in range(LAYERS):
        name = f"encoder.layers.{i}.crossattention"
        queries = norm(queries, f"{name}.norm1")
        seen = torch.cat((queries, norm(memory, f"{name}.normk")), dim=1)
        q, k, v = (
            linear(x, f"{name}.attention.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, part in ((queries, "query"), (seen, "key"), (seen, "value"))
        )
        weights = (q @ k.mT / math.sqrt(width // heads)).softmax(-1)
        queries = queries + linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.output.out_proj")
        inner = norm(queries, f"{name}.output.norm2")
        gated = F.silu(linear(inner, f"{name}.output.mlp.w1")) * linear(inner, f"{name}.output.mlp.w3")
        queries = queries + linear(norm(gated, f"{name}.output.mlp.ffn_ln", 1e-6), f"{name}.output.mlp.w2")
    expected = linear(queries, "visual_output_fc")
    if end:
        expected = torch.cat((expected, state["vit_eos"].expand(2, -1, -1)), dim=1)
    torch.testing.assert_close(module(given, (4, 5)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("out_dim", "count"), [(896, 102_862_720), (4096, 106_142_720)])
def test_honeybee_s_resampler_has_the_release_s_parameters(out_dim: int, count: int) -> None:
    with torch.device("meta"):
        module = HoneybeeResampler(1024, out_dim, out_grid=(8, 8))
    assert module.num_heads == 16
    assert sum(p.numel() for p in module.parameters()) == count


def test_honeybee_s_resampler_does_not_know_where_features_are() -> None:
    torch.manual_seed(0)
    module, given = shaken(HoneybeeResampler(C, D, out_grid=(3, 2), num_layers=2)), draw(1, 16, C)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(given[:, order]), module(given), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(module(given)[:, 0], module(given)[:, 1])
    torch.nn.init.zeros_(module.queries)
    torch.testing.assert_close(module(given)[:, 0], module(given)[:, 1])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no weight 'query_tokens'"),
        ({"query_tokens": torch.zeros(1, 2, 3), "pos_emb": torch.zeros(1)}, "unknown weight 'pos_emb'"),
    ],
)
def test_a_checkpoint_of_another_module_is_an_error(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HoneybeeResampler.import_state_dict(state)


def test_honeybee_s_resampler_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="num_layers=0"):
        HoneybeeResampler(C, D, num_layers=0)
