"""Saliency of a tap against attention maps that only an eager encoder builds."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.encoders import DEPTH, HEADS, PATCHES, PREFIX, build, captured, every_encoder, hooks, images, logits_of
from vision_remember import MultiLevelTap, cls_saliency
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
