"""The tap: levels as Hugging Face's encoders give them themselves, encoders of one's own, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.encoders import GRID, PATCH, PREFIX, SIZES, build, captured, every_encoder, hf, hooks, images
from tests.hosts import set_checkpointing
from vision_remember import MultiLevelTap
from vision_remember.adapters.activation_checkpointing import HOOKS_STAY_OUTSIDE
from vision_remember.encoder import EncoderSpec


@pytest.mark.parametrize("levels", [(2, 4), (0, 1, 2, 3, 4), (4, 0, 2), (-1,), (-5, -2), (3, -1, 0)], ids=str)
@every_encoder
def test_levels_are_hidden_states_in_the_order_asked_for(name: str, levels: tuple[int, ...]) -> None:
    encoder = build(name)
    expected = encoder(images(), output_hidden_states=True).hidden_states
    result = captured(encoder, images(), levels=levels, saliency=None)
    assert len(result.levels) == len(levels)
    for level, features in zip(levels, result.levels, strict=True):
        assert torch.equal(features, expected[level][:, PREFIX[name] :])
    assert result.grid == GRID
    assert result.saliency is None
    assert torch.equal(result.joined(), torch.cat(result.levels, -1))


@pytest.mark.parametrize("size", [(28, 28), (20, 36), (36, 20), (4, 28)], ids=str)
@every_encoder
def test_images_of_other_shapes_have_their_own_grid(name: str, size: tuple[int, int]) -> None:
    encoder, grid = build(name), (size[0] // PATCH, size[1] // PATCH)
    run = {"interpolate_pos_encoding": True}
    expected = encoder(images(size=size), output_hidden_states=True, **run).hidden_states
    result = captured(encoder, images(size=size), run=run, levels=(0, 3))
    assert result.grid == grid
    assert torch.equal(result.levels[1], expected[3][:, PREFIX[name] :])
    assert result.saliency.shape == (2, math.prod(grid))


@pytest.mark.parametrize("saliency", ["auto", "received", None])
@every_encoder
def test_the_encoder_computes_the_same_with_and_without_capture(name: str, saliency: Any) -> None:
    encoder = build(name)
    plain = encoder(images())
    with MultiLevelTap(encoder, (0, 2, 4), saliency=saliency).capture() as result:
        tapped = encoder(images())
    assert result.output is tapped
    assert plain.keys() == tapped.keys()
    assert all(torch.equal(plain[key], tapped[key]) for key in plain)


@every_encoder
def test_levels_have_gradients_where_the_encoder_trains_and_saliency_never(name: str) -> None:
    encoder = build(name).train()
    result = captured(encoder, images())
    assert not result.saliency.requires_grad
    result.joined().square().sum().backward()
    first, last = encoder.encoder.layers[0], encoder.encoder.layers[-1]
    assert first.self_attn.q_proj.weight.grad.any()
    assert last.mlp.fc2.weight.grad.any()
    encoder.requires_grad_(False)
    assert not any(level.requires_grad for level in captured(encoder, images()).levels)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@every_encoder
def test_activation_checkpointing_of_the_encoder_changes_nothing(name: str, use_reentrant: bool) -> None:
    if use_reentrant and not HOOKS_STAY_OUTSIDE:
        pytest.skip("before transformers 5.23, re-entrant checkpoints run hooks inside, where no gradient passes")
    encoder = build(name).double().train()  # float32 sums differ in their last bits from one order to another

    def gradients() -> list[Tensor]:
        encoder.zero_grad()
        result = captured(encoder, images().double().requires_grad_(), levels=(1, 3))
        result.joined().sin().sum().backward()
        return [result.joined(), result.saliency, *(p.grad for p in encoder.parameters() if p.grad is not None)]

    expected = gradients()
    set_checkpointing(encoder, use_reentrant=use_reentrant)
    torch.testing.assert_close(gradients(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_encoder
def test_half_precision_encoders(name: str, dtype: torch.dtype) -> None:
    encoder = build(name)
    exact = captured(encoder, images())
    result = captured(encoder.to(dtype), images().to(dtype))
    assert {level.dtype for level in result.levels} == {dtype}
    torch.testing.assert_close(result.saliency.float(), exact.saliency, rtol=0, atol=0.05)


class _Block(nn.Module):
    """Returns a tuple and is called by keyword, as some do."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(8)
        self.q, self.k, self.out = (nn.Linear(8, 8) for _ in range(3))
        self.heads = 2

    def forward(self, *, hidden_states: Tensor) -> tuple[Tensor, None]:
        return hidden_states + self.out(self.before(hidden_states)), None


class _Encoder(nn.Module):
    """CLS, two registers, patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.prefix = nn.Parameter(torch.randn(1, 3, 8))
        self.blocks = nn.ModuleList(_Block() for _ in range(3))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        states = [torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)]
        for block in self.blocks:
            states.append(block(hidden_states=states[-1])[0])
        return states


SPEC: dict[str, Any] = {
    "name": "mine",
    "classes": ("_Encoder",),
    "layers": "blocks",
    "patch_embedding": "patches",
    "prefix_tokens": 3,
    "cls_token": 0,
    "norm": "before",
    "query": "q",
    "key": "k",
    "num_heads": "heads",
}


def test_a_spec_is_all_that_an_encoder_of_ones_own_needs() -> None:
    torch.manual_seed(0)
    encoder, pixels = _Encoder(), images(size=(8, 12))
    result = captured(encoder, pixels, levels=(3, 0, 1), spec=EncoderSpec(**SPEC))
    states = encoder(pixels)
    assert all(torch.equal(a, states[b][:, 3:]) for a, b in zip(result.levels, (3, 0, 1), strict=True))
    assert result.grid == (4, 6)
    block = encoder.blocks[2]
    query, key = (p(block.before(states[2])).unflatten(-1, (2, 4)) for p in (block.q, block.k))
    logits = torch.einsum("bhd,bnhd->bhn", query[:, 0], key[:, 3:]) / 2
    torch.testing.assert_close(result.saliency, logits.mean(1).sigmoid())


def test_an_unknown_encoder_is_an_error_that_names_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"Linear has no list of blocks.*EncoderSpec"):
        MultiLevelTap(nn.Linear(3, 3), (1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "layers"}, r"no module 'layers' for its blocks.*patches, blocks"),
        ({"layers": "patches"}, "patches: expected a ModuleList"),
    ],
)
def test_a_spec_that_does_not_fit_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiLevelTap(_Encoder(), (1,), spec=EncoderSpec(**{**SPEC, **changes}))


@pytest.mark.parametrize("path", ["patch_embedding", "norm", "query", "key", "num_heads"])
def test_a_spec_is_checked_when_the_tap_is_made(path: str) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        MultiLevelTap(_Encoder(), (1,), spec=EncoderSpec(**{**SPEC, path: "nowhere"}))


def test_a_grid_that_does_not_match_the_tokens_is_an_error() -> None:
    encoder = _Encoder()
    before = hooks(encoder)
    with pytest.raises(ValueError, match=r"a hidden state holds 25 positions, but the patch grid=4x6 has 24"):
        captured(encoder, images(size=(8, 12)), levels=(2,), spec=EncoderSpec(**{**SPEC, "prefix_tokens": 2}))
    assert hooks(encoder) == before


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip", {"levels": (2, 5)}, r"levels=\[2, 5\]: CLIPVisionModel has hidden states 0..4 \(or -5..-1\)"),
        ("siglip", {"levels": (13, 18, 23)}, r"levels=\[13, 18, 23\]: SiglipVisionModel has hidden states 0..4"),
        ("clip", {"levels": (-6,)}, r"levels=\[-6\]"),
        ("clip", {"levels": ()}, r"levels=\[\]"),
        ("clip", {"levels": (4, -1)}, r"levels=\[4, -1\]: a level is repeated"),
        ("clip", {"levels": (2.0,)}, r"levels=\[2.0\]"),
        ("clip", {"levels": ("last",)}, r"levels=\['last'\]"),
        ("clip", {"saliency_level": 5}, "saliency_level=5: CLIPVisionModel has hidden states 0..4"),
        ("clip", {"saliency_level": 1.5}, "saliency_level=1.5:"),
        ("clip", {"saliency_level": 0}, "saliency_level=0 are the embeddings"),
        ("clip", {"levels": (0,)}, "saliency_level=0 are the embeddings"),
        ("siglip", {"saliency": "cls"}, "SiglipVisionModel has no CLS token; use 'received'"),
        ("clip", {"saliency": "map_head"}, "CLIPVisionModel has no pooling head; use 'received'"),
        ("clip", {"saliency": "rollout"}, "saliency='rollout': expected 'auto'"),
        ("clip", {"variant": "logits"}, "did you mean 'logit'"),
    ],
)
def test_options_that_the_encoder_cannot_serve_are_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiLevelTap(build(name), **{"levels": (2, 4), **options})


@pytest.mark.parametrize("options", [{"center": "median"}, {"temperature": 0}], ids=str)
def test_saliency_options_are_checked_when_the_tap_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MultiLevelTap(build(), (2, 4), **options)


def test_map_head_needs_the_head_to_be_kept() -> None:
    config = hf.SiglipVisionConfig(**SIZES, vision_use_head=False)
    with pytest.raises(ValueError, match="no pooling head"):
        MultiLevelTap(hf.SiglipVisionModel(config), (2, 4), saliency="map_head")


@every_encoder
def test_subclasses_of_a_known_encoder_are_known(name: str) -> None:
    """FSDP swaps a module's class for a subclass of it."""
    encoder = build(name)
    expected = captured(encoder, images()).joined()
    encoder.__class__ = type("Sharded", (type(encoder),), {})
    assert torch.equal(captured(encoder, images()).joined(), expected)
