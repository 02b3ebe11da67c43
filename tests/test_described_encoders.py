"""Encoders of many kinds, in the table or described by their modules: levels, grids and saliency of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from vision_remember import MultiLevelTap
from vision_remember.adapters.encoders import ENCODERS, known_encoder

HEADS = 4
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": HEADS}
SQUARE = {**SIZES, "image_size": 32, "patch_size": 4}
QWEN = {"depth": 4, "num_heads": HEADS, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
GRIDS = torch.tensor([[1, 4, 8], [1, 6, 4], [1, 4, 8]])

# Prefix tokens and the model, of towers that take square images.
FIXED: dict[str, tuple[int, Callable[[], Any]]] = {
    "clip": (1, lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SQUARE))),
    "siglip": (0, lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SQUARE))),
    "vit": (1, lambda: hf.ViTModel(hf.ViTConfig(**SQUARE))),
    "dinov2": (1, lambda: hf.Dinov2Model(hf.Dinov2Config(**SQUARE))),
    "dinov2 with registers": (5, lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SQUARE))),
    "dinov3": (3, lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SQUARE, num_register_tokens=2))),
    "internvit": (
        1,
        lambda: hf.AutoModel.from_config(
            hf.InternVLVisionConfig(**{**SQUARE, "image_size": [32, 32], "patch_size": [4, 4]})
        ),
    ),
}


def build(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    encoder = make().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return encoder


def block_inputs(encoder: Any, tap: MultiLevelTap, run: Callable[[], Any]) -> list[Tensor]:
    """What goes into each block and out of the last, by hooks of the test's own."""
    states: list[Tensor] = []
    blocks = list(encoder.get_submodule(tap.spec.layers))
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in blocks
    ]
    handles.append(
        blocks[-1].register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    )
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return states


def mean_logits(tap: MultiLevelTap, encoder: Any, state: Tensor, source: slice, patches: slice) -> Tensor:
    """(B, patches), the mean over heads and over the queries of ``source`` of q.k / sqrt(d), written out."""
    block = encoder.get_submodule(tap.spec.layers)[tap.saliency_level - 1]
    normed = block.get_submodule(tap.spec.norm)(state)
    if tap.spec.fused:
        query, key, _ = block.get_submodule(tap.spec.fused)(normed).chunk(3, -1)
    else:
        query, key = (block.get_submodule(path)(normed) for path in (tap.spec.query, tap.spec.key))
    query, key = (x.unflatten(-1, (HEADS, -1)) for x in (query[:, source], key[:, patches]))
    return torch.einsum("bqhd,bkhd->bhqk", query, key).mean((1, 2)) / math.sqrt(query.shape[-1])


@pytest.mark.parametrize("name", FIXED)
def test_towers_for_square_images(name: str) -> None:
    prefix, make = FIXED[name]
    encoder = build(make)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tap = MultiLevelTap(encoder, (0, 2, 4), saliency_level=3)
    states = block_inputs(encoder, tap, lambda: encoder(pixels))
    with tap.capture() as captured, torch.no_grad():
        encoder(pixels)
    assert captured.grid == (8, 8)
    for level, features in zip((0, 2, 4), captured.levels, strict=True):
        assert torch.equal(features, states[level][:, prefix:])
    assert tap.saliency == ("cls" if prefix else "received")
    source = slice(0, 1) if prefix else slice(None)
    with torch.no_grad():
        expected = mean_logits(tap, encoder, states[2], source, slice(prefix, None)).sigmoid()
    torch.testing.assert_close(captured.saliency, expected)


PACKED: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: Qwen2VisionTransformerPretrainedModel._from_config(_vision("Qwen2VLConfig", embed_dim=32)),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VisionTransformerPretrainedModel._from_config(
        _vision("Qwen2_5_VLConfig", hidden_size=32, intermediate_size=48, window_size=16, fullatt_block_indexes=[1])
    ),
    "qwen3_vl": lambda: hf.Qwen3VLVisionModel._from_config(
        _vision("Qwen3VLConfig", hidden_size=32, intermediate_size=48, deepstack_visual_indexes=[1])
    ),
}


def test_every_registered_tower_for_images_of_any_size_is_among_them() -> None:
    packed = {name for name, spec in ENCODERS.items() if spec.order != "raster"}
    assert packed == {known_encoder(build(make)).name for make in PACKED.values()}  # type: ignore[union-attr]


def _vision(config: str, **options: Any) -> Any:
    vision = type(getattr(hf, config)().vision_config)
    return vision(**{**QWEN, **options})


@pytest.mark.parametrize("name", PACKED)
def test_qwen_towers_give_each_image_in_raster_order(name: str) -> None:
    encoder = build(PACKED[name])
    assert known_encoder(encoder) is not None
    pixels = torch.randn(int(GRIDS.prod(1).sum()), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    tap = MultiLevelTap(encoder, (0, 3), saliency_level=2)

    def capture(pixels: Tensor, grids: Tensor) -> Any:
        with tap.capture() as captured, torch.no_grad():
            encoder(pixels, grid_thw=grids)
        return captured

    whole = capture(pixels, GRIDS)
    assert [(group.numbers, group.grid) for group in whole.groups] == [((0, 2), (4, 8)), ((1,), (6, 4))]
    # Images do not see each other, so each by itself gives the same.
    cuts = [0, *GRIDS.prod(1).cumsum(0).tolist()]
    for number, (group, tile) in enumerate([(0, 0), (1, 0), (0, 1)]):
        alone = capture(pixels[cuts[number] : cuts[number + 1]], GRIDS[number : number + 1])
        for level in (0, 1):
            torch.testing.assert_close(whole.groups[group].levels[level][tile], alone.levels[level][0])
        torch.testing.assert_close(whole.groups[group].saliency[tile], alone.saliency[0])
    # Raster order: the patch embedding of a cell stands at its place. Without windows and position embeddings level 0
    # is that embedding.
    if name != "qwen3_vl":
        embedded = encoder.patch_embed(pixels[: cuts[1]])
        blocks = embedded.view(2, 4, 2, 2, -1).transpose(1, 2).reshape(32, -1)
        torch.testing.assert_close(whole.groups[0].levels[0][0], blocks.detach())
    states = block_inputs(encoder, tap, lambda: encoder(pixels[cuts[1] : cuts[2]], grid_thw=GRIDS[1:2]))
    with torch.no_grad():
        logits = mean_logits(tap, encoder, states[1][None], slice(None), slice(None))[0]
    # The same values, in another order.
    torch.testing.assert_close(whole.groups[1].saliency[0].sort().values, logits.sigmoid().sort().values)


def test_pixtral_gives_each_image_by_itself() -> None:
    config = hf.PixtralVisionConfig(**SIZES, image_size=64, patch_size=4, head_dim=8)
    encoder = build(lambda: hf.PixtralVisionModel(config))
    sizes = [(16, 32), (24, 16)]
    pixels = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    tap = MultiLevelTap(encoder, (0, 4))
    with tap.capture() as captured, torch.no_grad():
        encoder(pixels, image_sizes=sizes)
    assert [(group.numbers, group.grid) for group in captured.groups] == [((0,), (4, 8)), ((1,), (6, 4))]
    for image, (height, width) in enumerate(sizes):
        with tap.capture() as alone, torch.no_grad():
            encoder(pixels[image : image + 1, :, :height, :width], image_sizes=[(height, width)])
        for level in (0, 1):
            torch.testing.assert_close(captured.groups[image].levels[level][0], alone.levels[level][0])
        torch.testing.assert_close(captured.groups[image].saliency[0], alone.saliency[0])


def test_siglip_2_leaves_out_the_padding() -> None:
    encoder = build(lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**SIZES, patch_size=4, num_patches=64)))
    shapes = torch.tensor([[4, 8], [6, 4], [4, 8]])
    mask = torch.arange(40)[None] < shapes.prod(1)[:, None]
    pixels = torch.randn(3, 40, 48, generator=torch.Generator().manual_seed(1))
    tap = MultiLevelTap(encoder, (2, 4))
    with tap.capture() as captured, torch.no_grad():
        encoder(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes)
    assert [(group.numbers, group.grid) for group in captured.groups] == [((0, 2), (4, 8)), ((1,), (6, 4))]
    with tap.capture() as alone, torch.no_grad():
        only = {"pixel_attention_mask": mask[1:2, :24], "spatial_shapes": shapes[1:2]}
        encoder(pixel_values=pixels[1:2, :24], **only)
    for level in (0, 1):
        torch.testing.assert_close(captured.groups[1].levels[level], alone.levels[level])
    torch.testing.assert_close(captured.groups[1].saliency, alone.saliency)


def test_groups_are_asked_for_where_sizes_differ() -> None:
    encoder = build(PACKED["qwen2_vl"])
    with MultiLevelTap(encoder, (2,)).capture() as captured:
        encoder(torch.randn(int(GRIDS.prod(1).sum()), 96), grid_thw=GRIDS)
    with pytest.raises(RuntimeError, match=r"different grids \(4x8, 6x4\): read .groups"):
        _ = captured.levels
