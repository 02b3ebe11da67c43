"""Projectors that sample: the D-Abstractor and the deformable pool, against Deformable DETR."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr import modeling_deformable_detr as detr

from tests.reference import visible_cells
from tests.test_attention_projectors import C, D, draw, shaken
from vision_remember import build_projector
from vision_remember.grid import Grid
from vision_remember.projectors.d_abstractor import DAbstractor
from vision_remember.projectors.deformable_attention import DeformableAttention

# deformable attention, D-Abstractor, deformable pool


def detr_config() -> Any:
    return DeformableDetrConfig(
        d_model=C, num_feature_levels=1, decoder_attention_heads=2, decoder_n_points=3, decoder_ffn_dim=8,
        use_timm_backbone=False, use_pretrained_backbone=False, attn_implementation="eager",
    )  # fmt: skip


DETR_NAMES = {
    "self_attn.q_proj": "self_attention.query",
    "self_attn.k_proj": "self_attention.key",
    "self_attn.v_proj": "self_attention.value",
    "self_attn.o_proj": "self_attention.out",
    "self_attn_layer_norm": "self_norm",
    "encoder_attn.sampling_offsets": "cross_attention.offsets",
    "encoder_attn.attention_weights": "cross_attention.weights",
    "encoder_attn.value_proj": "cross_attention.value",
    "encoder_attn.output_proj": "cross_attention.out",
    "encoder_attn_layer_norm": "cross_norm",
    "mlp.fc1": "feed_forward.0",
    "mlp.fc2": "feed_forward.2",
    "final_layer_norm": "feed_forward_norm",
}


def test_d_abstractor_is_a_stack_of_deformable_detrs_layers() -> None:
    layer = shaken(detr.DeformableDetrDecoderLayer(detr_config()))
    grid, out_grid = (6, 4), (3, 2)
    module = shaken(
        DAbstractor(C, D, out_grid=out_grid, position_grid=grid, ffn_dim=8, num_layers=2, num_heads=2, num_points=3)
    )
    state = layer.state_dict()
    for ours in module.layers:
        ours.load_state_dict({f"{b}.{p}": state[f"{a}.{p}"] for a, b in DETR_NAMES.items() for p in ("weight", "bias")})
    given = draw(2, 24, C)
    memory = given + module.positions
    positions = F.avg_pool2d(memory.transpose(1, 2).reshape(2, C, *grid), 2).flatten(2).transpose(1, 2)
    queries = module.queries.expand(2, -1, -1)
    for _ in module.layers:
        queries = layer(
            queries,
            object_queries_position_embeddings=positions,
            reference_points=module.references(grid, out_grid).expand(2, -1, -1).unsqueeze(2),
            spatial_shapes=torch.tensor([grid]),
            spatial_shapes_list=[grid],
            level_start_index=torch.tensor([0]),
            encoder_hidden_states=memory,
        )
    torch.testing.assert_close(module(given, grid), module.out(queries), rtol=1e-4, atol=1e-4)


def test_deformable_attention_starts_as_deformable_detrs_does() -> None:
    theirs = detr.DeformableDetrMultiscaleDeformableAttention(detr_config(), num_heads=8, n_points=3)
    detr.DeformableDetrPreTrainedModel(detr_config())._init_weights(theirs)
    ours = DeformableAttention(C, 8, 3)
    assert ours.offsets.bias.any()
    for a, b in (("sampling_offsets", "offsets"), ("attention_weights", "weights")):
        torch.testing.assert_close(ours.get_submodule(b).state_dict(), theirs.get_submodule(a).state_dict())
    for a, b in (("value_proj", "value"), ("output_proj", "out")):
        ours_std, theirs_std = ours.get_parameter(f"{b}.weight").std(), theirs.get_parameter(f"{a}.weight").std()
        torch.testing.assert_close(ours_std, theirs_std, rtol=0.2, atol=0)


def test_without_offsets_deformable_attention_is_a_bilinear_resize() -> None:
    """And the D-Abstractor's references are the corners of ``align_corners=True``."""
    module, grid, out_grid = DAbstractor(C, D, out_grid=(3, 2)), (6, 5), (3, 2)
    attention = module.layers[0].cross_attention
    nn.init.zeros_(attention.offsets.bias)
    given = draw(2, 30, C)
    read = attention(draw(2, 6, C), given, references=module.references(grid, out_grid), step=(1 / 5, 1 / 6), grid=grid)
    raster = attention.value(given).transpose(1, 2).unflatten(2, grid)
    resized = F.interpolate(raster, size=out_grid, mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(read, attention.out(resized), rtol=1e-4, atol=1e-4)


def test_references_run_from_centre_to_centre_columns_first() -> None:
    references = DAbstractor(C, D, out_grid=(12, 12)).references((24, 24), (12, 12))
    wanted = torch.tensor([0.0208333, 0.1079545, 0.9791667])
    torch.testing.assert_close(references[[0, 1, 11], 0], wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(references[[0, 12, 132], 1], wanted, rtol=0, atol=1e-6)
    assert references[:12, 1].unique().numel() == 1
    torch.testing.assert_close(DAbstractor(C, D).references((9, 9), (1, 1)), torch.tensor([[0.5, 0.5]]))


def test_places_stay_precise_in_half_precision() -> None:
    module = DAbstractor(C, D, out_grid=(12, 12))
    precise = module.references((24, 24), (12, 12))
    assert torch.equal(module.bfloat16().references((24, 24), (12, 12)), precise)


def test_deformable_pool_without_layers_pools() -> None:
    module = build_projector("deformable_pool", C, D, ratio=4, num_layers=0)
    pooled = F.adaptive_avg_pool2d(draw(2, C, 6, 8), (3, 4)).flatten(2).transpose(1, 2)
    expected = module.out(module.features(pooled))
    torch.testing.assert_close(module(draw(2, C, 6, 8).flatten(2).transpose(1, 2), (6, 8)), expected)


@pytest.mark.parametrize(("grid", "out_grid"), [((8, 12), (2, 3)), ((9, 9), (3, 3))])
def test_deformable_pool_starts_inside_each_tokens_cells(grid: Grid, out_grid: Grid) -> None:
    """A bilinear read at their border still takes half of the next cell, no further one."""
    torch.manual_seed(0)
    module = build_projector("deformable_pool", C, D, out_grid=out_grid).eval()
    sees = visible_cells(out_grid, grid).float().reshape(-1, 1, *grid)
    near = F.max_pool2d(sees, 3, stride=1, padding=1).flatten(1) > 0
    given = draw(1, math.prod(grid), C)
    for cell in range(math.prod(grid)):
        other = given.clone()
        other[:, cell] += 5
        changed = (module(other, grid) - module(given, grid))[0].abs().amax(-1) > 1e-6
        assert not (changed & ~near[:, cell]).any()
        assert changed[sees.flatten(1)[:, cell] > 0].all()


def test_d_abstractor_checks_its_options() -> None:
    with pytest.raises(ValueError, match="num_layers=0"):
        DAbstractor(C, D, num_layers=0)
    with pytest.raises(ValueError, match="num_points=0"):
        DAbstractor(C, D, num_points=0)
    with pytest.raises(ValueError, match="position_grid="):
        DAbstractor(C, D, position_grid=(0, 3))
    with pytest.raises(ValueError, match="query_grid="):
        DAbstractor(C, D, query_grid=(0, 3))


def test_deformable_pools_references_are_the_middles_of_the_tokens_cells() -> None:
    """Between four cells a bilinear read is their mean, which is what pooling makes of them."""
    module: Any = build_projector("deformable_pool", C, D, ratio=4, num_layers=1)
    attention = module.layers[0].attention
    nn.init.zeros_(attention.offsets.bias)
    reads: list[Any] = []
    attention.register_forward_hook(lambda _, given, read: reads.append((given[1], read)))
    module(draw(2, 48, C), (6, 8))
    memory, read = reads[0]
    pooled = F.avg_pool2d(memory.transpose(1, 2).unflatten(2, (6, 8)), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(read, attention.out(attention.value(pooled)), rtol=1e-4, atol=1e-4)


def released_d_abstractor(cells: int, width: int, end: int) -> dict[str, torch.Tensor]:
    """Random weights under the names of Honeybee's release: six by six cells or so, 2x2 queries, one layer."""
    shapes: dict[str, tuple[int, ...]] = {
        "query_position_embeddings.weight": (4, width),
        "v_pos_emb": (1, cells, width),
        "reference_points": (1, 4, 2),
        "output_proj.weight": (D, width),
        "output_proj.bias": (D,),
    }
    if width != C:
        shapes |= {"input_proj.0.weight": (width, C), "input_proj.0.bias": (width,)}
    if end:
        shapes["eos_tokens"] = (1, end, width)
    sizes = {f"self_attn.{x}_proj": (width, width) for x in ("q", "k", "v", "out")}
    sizes |= {"encoder_attn.sampling_offsets": (12, width), "encoder_attn.attention_weights": (6, width)}
    sizes |= {f"encoder_attn.{x}_proj": (width, width) for x in ("value", "output")}
    sizes |= {"fc1": (8, width), "fc2": (width, 8)}
    shapes |= {f"layers.0.{name}.weight": size for name, size in sizes.items()}
    shapes |= {f"layers.0.{name}.bias": size[:1] for name, size in sizes.items()}
    norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    shapes |= {f"layers.0.{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    return {name: draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize(("width", "cells", "end"), [(C, 36, 0), (2 * C, 37, 3)], ids=["plain", "all options"])
def test_weights_of_honeybees_d_abstractor_fit(width: int, cells: int, end: int) -> None:
    """The layers are Deformable DETR's, in the names of its day; what is around them is read here."""
    state = released_d_abstractor(cells, width, end)
    module = DAbstractor(
        C, D, out_grid=(2, 2), position_grid=(6, 6), hidden_dim=width, ffn_dim=8, num_layers=1, num_heads=2,
        num_points=3, end_tokens=end,
    )  # fmt: skip
    module.load_state_dict(module.import_state_dict(state), strict=True)
    torch.testing.assert_close(module.references((6, 6), (2, 2)), state["reference_points"][0])

    config = detr_config()
    config.d_model = width
    layer = detr.DeformableDetrDecoderLayer(config)
    today = {"self_attn.out_proj": "self_attn.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    layer.load_state_dict({
        f"{today.get(name.rpartition('.')[0], name.rpartition('.')[0])}.{name.rpartition('.')[2]}": weight
        for name, weight in ((k.removeprefix("layers.0."), w) for k, w in state.items() if k.startswith("layers.0."))
    })  # fmt: skip
    given = draw(2, 36, C, seed=99)
    memory = given if width == C else F.linear(given, state["input_proj.0.weight"], state["input_proj.0.bias"])
    memory = memory + state["v_pos_emb"][:, -36:]
    raster = memory.transpose(1, 2).unflatten(2, (6, 6))
    read = layer.eval()(
        state["query_position_embeddings.weight"].expand(2, -1, -1),
        object_queries_position_embeddings=F.adaptive_avg_pool2d(raster, 2).flatten(2).transpose(1, 2),
        reference_points=state["reference_points"].expand(2, -1, -1).unsqueeze(2),
        spatial_shapes=torch.tensor([(6, 6)]),
        spatial_shapes_list=[(6, 6)],
        level_start_index=torch.tensor([0]),
        encoder_hidden_states=memory,
    )
    if end:
        read = torch.cat((read, state["eos_tokens"].expand(2, -1, -1)), dim=1)
    expected = F.linear(read, state["output_proj.weight"], state["output_proj.bias"])
    torch.testing.assert_close(module(given), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("missing", ["query_position_embeddings.weight", "v_pos_emb", "reference_points"])
def test_a_checkpoint_that_lacks_a_table_is_an_error_that_names_it(missing: str) -> None:
    state = released_d_abstractor(36, C, 0)
    del state[missing]
    with pytest.raises(ValueError, match=f"no weight '{missing}'"):
        DAbstractor.import_state_dict(state)


@pytest.mark.parametrize("foreign", ["level_emb", "layers.0.fc3.weight", "abstractor.output_proj.weight"])
def test_a_weight_that_the_d_abstractor_lacks_is_an_error(foreign: str) -> None:
    with pytest.raises(ValueError, match=f"unknown weight '{foreign}'"):
        DAbstractor.import_state_dict({**released_d_abstractor(36, C, 0), foreign: torch.zeros(1)})
