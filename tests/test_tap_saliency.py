"""Saliency of a tap against attention maps that only an eager encoder builds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.encoders import (
    DEPTH,
    HEADS,
    PATCHES,
    PREFIX,
    WIDTH,
    build,
    captured,
    every_encoder,
    hooks,
    images,
    logits_of,
)
from vision_remember import MultiLevelTap, cls_saliency
from vision_remember.encoder import EncoderSpec
from vision_remember.saliency import SALIENCY_VARIANTS


@pytest.mark.parametrize("level", [1, 3, 4, -2])
def test_cls_saliency_is_that_of_the_eager_attention_map(level: int) -> None:
    """Before the softmax, to 1e-5, although the encoder runs SDPA."""
    encoder, eager = build(), build(attention="eager")
    assert encoder.config._attn_implementation == "sdpa"
    saliency = captured(encoder, images(), saliency="cls", saliency_level=level).saliency
    logits = logits_of(eager, level % (DEPTH + 1), images())
    torch.testing.assert_close(saliency, logits[:, :, 0, 1:].mean(1).sigmoid(), rtol=0, atol=1e-5)
    assert saliency.std(-1).min() > 0.01, "a flat map would compare equal to anything flat"
    # The logits are those of the map: their softmax is the eager layer's own.
    attention = eager(images(), output_attentions=True).attentions[level % (DEPTH + 1) - 1]
    torch.testing.assert_close(logits.softmax(-1), attention, rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", [1, 4])
def test_cls_saliency_can_be_told_from_the_softmaxed_map_alone(level: int) -> None:
    """A softmax loses an offset per head only, and centring takes their mean away."""
    row = build(attention="eager")(images(), output_attentions=True).attentions[level - 1][:, :, 0, 1:]
    take = functools.partial(captured, build(), images(), saliency="cls", saliency_level=level)

    log_mean = row.log().mean(1)
    centred = take(center="mean").saliency.logit()
    torch.testing.assert_close(centred, log_mean - log_mean.mean(-1, keepdim=True), rtol=0, atol=1e-5)

    shares = row / row.sum(-1, keepdim=True)  # over patches alone, without what the CLS token gives itself
    torch.testing.assert_close(take(variant="softmax").saliency.logit(), shares.mean(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", [1, 4])
@every_encoder
def test_received_is_the_mean_logit_over_patch_queries_and_heads(name: str, level: int) -> None:
    saliency = captured(build(name), images(), saliency="received", saliency_level=level).saliency
    logits = logits_of(build(name, attention="eager"), level, images())[:, :, PREFIX[name] :, PREFIX[name] :]
    torch.testing.assert_close(saliency, logits.mean((1, 2)).sigmoid(), rtol=0, atol=1e-5)
    assert saliency.std(-1).min() > 0.01


def test_map_head_is_what_the_pooling_heads_attention_says() -> None:
    encoder = build("siglip")
    with torch.no_grad():
        last = encoder(images()).last_hidden_state
        probe = encoder.head.probe.expand(2, -1, -1)
        weights = encoder.head.attention(probe, last, last, average_attn_weights=False)[1][:, :, 0]
        averaged = encoder.head.attention(probe, last, last)[1][:, 0]
    take = functools.partial(captured, encoder, images(), saliency="map_head")

    torch.testing.assert_close(take(variant="softmax").saliency.logit(), averaged, rtol=0, atol=1e-5)
    log_mean = weights.log().mean(1)
    centred = take(center="mean").saliency.logit()
    torch.testing.assert_close(centred, log_mean - log_mean.mean(-1, keepdim=True), rtol=0, atol=1e-5)
    assert take().saliency.std(-1).min() > 0.01


class _Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.seen.add(tuple(tensor.shape))
        return result

    def maps(self) -> set[tuple[int, ...]]:
        sides = (PATCHES, PATCHES + 1)
        return {shape for shape in self.seen if len(shape) > 1 and shape[-1] in sides and shape[-2] in sides}


@pytest.mark.parametrize(
    ("name", "saliency"), [("clip", "cls"), ("clip", "received"), ("siglip", "received"), ("siglip", "map_head")]
)
def test_no_attention_map_is_built(name: str, saliency: Any) -> None:
    encoder = build(name)
    with torch.no_grad(), _Shapes() as shapes:
        result = captured(encoder, images(), saliency=saliency)
    assert result.saliency is not None
    assert not shapes.maps()
    with torch.no_grad(), _Shapes() as shapes:
        build(name, attention="eager")(images())
    assert shapes.maps(), "this would have seen a map"


def test_the_deepest_level_tells_the_saliency_by_default() -> None:
    encoder = build()
    for levels, deepest in (((1, 3), 3), ((-1, 0), 4), ((2, 1), 2)):
        by_default = captured(encoder, images(), levels=levels).saliency
        for level in (1, 2, 3, 4):
            same = torch.equal(by_default, captured(encoder, images(), levels=levels, saliency_level=level).saliency)
            assert same == (level == deepest)


@pytest.mark.parametrize(("name", "source"), [("clip", "cls"), ("siglip", "received")])
def test_auto_takes_the_cls_token_where_there_is_one(name: str, source: Any) -> None:
    encoder = build(name)
    assert torch.equal(captured(encoder, images()).saliency, captured(encoder, images(), saliency=source).saliency)


@pytest.mark.parametrize("variant", SALIENCY_VARIANTS)
def test_options_reach_the_map(variant: str) -> None:
    options: dict[str, Any] = {"variant": variant, "center": "zscore", "temperature": 0.7}
    encoder = build()
    logits = logits_of(encoder, 4, images())[:, :, 0, 1:]
    expected = cls_saliency(torch.ones(2, HEADS, 1), logits.unsqueeze(-1), **options)
    torch.testing.assert_close(captured(encoder, images(), **options).saliency, expected, rtol=0, atol=1e-5)


@every_encoder
def test_the_block_projects_once(name: str) -> None:
    """Its own queries and keys are read; nothing is projected again."""
    encoder = build(name)
    attention = encoder.encoder.layers[3].self_attn
    calls: list[str] = []
    for which in ("q_proj", "k_proj"):
        getattr(attention, which).register_forward_hook(lambda *_, which=which: calls.append(which))
    assert captured(encoder, images()).saliency is not None
    assert sorted(calls) == ["k_proj", "q_proj"]


class _Adapted(nn.Module):
    """What adapters put in a projection's place."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.base(x)
        return 2 * projected + x


@every_encoder
def test_a_projection_replaced_under_an_installed_tap_takes_part(name: str) -> None:
    """The hooks are on the module that stood there before."""
    encoder = build(name)
    tap = MultiLevelTap(encoder, (2, 4))
    tap.install()
    attention = encoder.encoder.layers[3].self_attn
    attention.k_proj = _Adapted(attention.k_proj)
    with tap.record() as seen, torch.no_grad():
        encoder(images())
    torch.testing.assert_close(seen.saliency, captured(encoder, images()).saliency, rtol=0, atol=1e-5)
    tap.remove()
    assert hooks(encoder) == 0
    logits = logits_of(encoder, 4, images())
    # The CLS token's row, or the mean over patch queries.
    row = logits[:, :, 0, 1:] if name == "clip" else logits.mean(2)
    torch.testing.assert_close(seen.saliency, row.mean(1).sigmoid(), rtol=0, atol=1e-5)


def test_a_block_that_projects_something_else_is_read_from_its_input() -> None:
    """Such as one that drops tokens ahead of its attention: what its projections return does not fit the patches."""

    class Halved(nn.Module):
        def __init__(self, attention: nn.Module) -> None:
            super().__init__()
            self.attention = attention
            self.q_proj, self.k_proj, self.num_heads = attention.q_proj, attention.k_proj, attention.num_heads

        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            self.attention(hidden_states[:, ::2], **kwargs)
            return self.attention.out_proj(hidden_states), None

    encoder = build()
    expected = captured(encoder, images()).saliency
    layer = encoder.encoder.layers[3]
    layer.self_attn = Halved(layer.self_attn)
    torch.testing.assert_close(captured(encoder, images()).saliency, expected, rtol=0, atol=1e-5)


class _Attention(nn.Module):
    """Separate or fused projections; ``scaled`` writes into what they return, as an in-place rotary embedding does."""

    def __init__(self, *, fused: bool = False, scaled: bool = False) -> None:
        super().__init__()
        self.num_heads, self.scaled = HEADS, scaled
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1) if hasattr(self, "qkv") else (self.q(x), self.k(x), self.v(x))
        if self.scaled:
            query, key = query.mul_(0.5), key.neg_()
        heads = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key, value))
        return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class _Block(nn.Module):
    def __init__(self, attention: nn.Module, *, in_place: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.norm, self.attention, self.in_place, self.broken = nn.LayerNorm(WIDTH), attention, in_place, broken

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        if isinstance(self.attention, nn.MultiheadAttention):
            attended, _ = self.attention(normed, normed, normed, need_weights=False)
        else:
            attended = self.attention(normed)
        if self.broken:
            raise MemoryError
        return x.add_(attended) if self.in_place else x + attended


class _Encoder(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module] = _Attention, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(_Block(attention(), **options) for _ in range(2))
        self.checkpoint: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.checkpoint is None else checkpoint(layer, x, use_reentrant=self.checkpoint)
        return x


def spec_of(encoder: _Encoder) -> EncoderSpec:
    paths = {"query": "attention.q", "key": "attention.k"}
    if hasattr(encoder.layers[0].attention, "qkv"):
        paths = {"fused": "attention.qkv"}
    elif isinstance(encoder.layers[0].attention, nn.MultiheadAttention):
        paths = {"fused": "attention"}
    heads = {"norm": "norm", "num_heads": "attention.num_heads"}
    return EncoderSpec(name="written", classes=("_Encoder",), layers="layers", **heads, **paths)


def cells() -> Tensor:
    return torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(2))


def expected_map(encoder: _Encoder) -> Tensor:
    """The first block's mean logits as the definition says, from its input."""
    block: Any = encoder.layers[0]
    normed, attention = block.norm(cells()), block.attention
    if hasattr(attention, "qkv"):
        made = attention.qkv(normed).chunk(3, -1)[:2]
    else:
        made = (attention.q(normed), attention.k(normed))
    query, key = (part.unflatten(-1, (HEADS, -1)) for part in made)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(WIDTH // HEADS)
    return logits.mean((1, 2)).sigmoid().detach()


def tap_of(encoder: _Encoder) -> MultiLevelTap:
    return MultiLevelTap(encoder, (1,), saliency="received", spec=spec_of(encoder))


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("scaled", [False, True], ids=["kept", "written into"])
def test_projections_are_read_before_anybody_writes_into_them(fused: bool, scaled: bool) -> None:
    encoder = _Encoder(lambda: _Attention(fused=fused, scaled=scaled))
    attention: Any = encoder.layers[0].attention
    calls: list[int] = []
    (attention.qkv if fused else attention.k).register_forward_hook(lambda *_: calls.append(1))
    with tap_of(encoder).capture() as seen, torch.no_grad():
        encoder(cells())
    assert len(calls) == 1
    torch.testing.assert_close(seen.saliency, expected_map(encoder))


def test_a_hook_put_on_a_projection_later_is_heeded() -> None:
    """And so is a module put in its place, though the block writes into its input."""
    encoder = _Encoder(in_place=True)
    attention: Any = encoder.layers[0].attention
    tap = tap_of(encoder)
    tap.install()
    attention.k.register_forward_hook(lambda module, args, output: -output)
    attention.q = _Adapted(attention.q)
    with tap.record() as seen, torch.no_grad():
        encoder(cells())
    torch.testing.assert_close(seen.saliency, expected_map(encoder))


def test_two_taps_do_not_disturb_each_other() -> None:
    encoder = _Encoder()
    first, second = tap_of(encoder), tap_of(encoder)
    with first.capture() as one, second.capture() as two, torch.no_grad():
        encoder(cells())
    torch.testing.assert_close(one.saliency, expected_map(encoder))
    torch.testing.assert_close(two.saliency, expected_map(encoder))


@pytest.mark.parametrize("reentrant", [False, True])
def test_nothing_of_a_block_is_kept_once_it_has_run(reentrant: bool) -> None:
    encoder = _Encoder()
    encoder.checkpoint = reentrant
    with tap_of(encoder).capture() as seen:
        output = encoder(cells().requires_grad_())
        torch.testing.assert_close(seen.saliency, expected_map(encoder))
        output.sum().backward()
        assert seen._awaited is None
    broken = _Encoder(broken=True)
    with pytest.raises(MemoryError), tap_of(broken).capture() as seen:
        broken(cells())
    assert seen._awaited is None


def test_a_tap_put_on_after_sharding_reads_whole_weights(tmp_path: Path) -> None:
    """An attention that calls no projections is asked from outside, while its block's weights are together."""
    encoder = _Encoder(lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).eval()
    with tap_of(encoder).capture() as whole, torch.no_grad():
        encoder(cells())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for layer in encoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(encoder, mesh=mesh)
        with tap_of(encoder).capture() as sharded, torch.no_grad():
            encoder(cells())
    finally:
        dist.destroy_process_group()
    assert whole.saliency.std() > 0.01
    torch.testing.assert_close(sharded.saliency, whole.saliency)
