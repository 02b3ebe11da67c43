"""The token mixer: off by default, an identity at first, both directions, and nothing beyond the image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vision_remember import INTERACTIONS, VisionRemember, VisionRememberConfig
from vision_remember.interactions import TokenMixer

D, N, B = 16, 6, 3
KINDS = ("self", "text_guided")

every_kind = pytest.mark.parametrize("kind", KINDS)


def mixer(kind: Any, **options: Any) -> TokenMixer:
    torch.manual_seed(0)
    return TokenMixer(D, kind, **{"zero_init": False, "num_heads": 2, **options}).double()


def arguments(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {"tokens": 100 * torch.randn(B, N, D, generator=generator, dtype=torch.float64)}
    if kind == "text_guided":
        given["text"] = torch.randn(B, D, generator=generator, dtype=torch.float64)
    return given


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def by_loops(module: TokenMixer, tokens: Tensor, text: Tensor | None, present: Tensor) -> Tensor:
    """The definition, for one image."""
    tokens = rms(tokens)
    extra = [] if text is None else [module.vr_text(rms(text))]
    size = module.vr_query.out_features // module.num_heads
    rows = []
    for i, token in enumerate(tokens):
        seen = torch.stack([x for j, x in enumerate(tokens) if present[j] or i == j] + extra)
        query, key, value = module.vr_query(token), module.vr_key(seen), module.vr_value(seen)
        heads = []
        for head in range(module.num_heads):
            part = slice(head * size, (head + 1) * size)
            heads.append((key[:, part] @ query[part] / math.sqrt(size)).softmax(0) @ value[:, part])
        rows.append(module.vr_out(torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "present"])
@every_kind
def test_it_is_self_attention_by_its_definition(kind: str, masked: bool) -> None:
    module, given = mixer(kind), arguments(kind)
    present = torch.ones(B, N, dtype=torch.bool)
    if masked:
        present[0, 2:] = present[1] = False
    update = module(**given, present=present if masked else None)
    expected = [
        by_loops(module, given["tokens"][b], given["text"][b] if "text" in given else None, present[b])
        for b in range(B)
    ]
    torch.testing.assert_close(update, torch.stack(expected), rtol=0, atol=1e-10)


@every_kind
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    module = mixer(kind)
    given = {k: x[:1, :3].clone() if x.ndim == 3 else x[:1].clone() for k, x in arguments(kind).items()}
    names = list(given)
    leaves = [given[name].requires_grad_() for name in names]
    present = torch.tensor([[True, False, True]])

    def update(*tensors: Tensor) -> Tensor:
        tokens, *text = tensors
        return module(tokens, text=text[0] if text else None, present=present)

    assert torch.autograd.gradcheck(update, leaves, atol=1e-4)


def test_every_token_sees_every_token_of_its_image_and_of_no_other() -> None:
    module = mixer("self")
    tokens = arguments("self")["tokens"].requires_grad_()
    for image in range(B):
        for token in range(N):
            (gradient,) = torch.autograd.grad(module(tokens)[image, token].sum(), tokens)
            seen = gradient.abs().sum(-1) > 0
            assert seen[image].all()
            assert seen.sum() == N


def test_tokens_that_do_not_exist_are_not_seen() -> None:
    module, tokens = mixer("self"), arguments("self")["tokens"]
    present = torch.ones(B, N, dtype=torch.bool)
    present[:, 4:] = False
    other = tokens.clone()
    other[:, 4:] = 7
    update, changed = (module(x, present=present) for x in (tokens, other))
    assert torch.equal(update[:, :4], changed[:, :4])
    torch.testing.assert_close(update[:, :4], module(tokens[:, :4]))
    nothing = module(tokens, present=torch.zeros_like(present))
    assert nothing.isfinite().all()


@every_kind
def test_it_starts_as_a_zero_update_that_can_learn(kind: str) -> None:
    module, given = mixer(kind, zero_init=True), arguments(kind)
    assert not module(**given).any()
    (module(**given) - given["tokens"]).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=1e-3).step()
    module.zero_grad()
    (module(**given) - given["tokens"]).square().sum().backward()
    assert not [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_text_reaches_every_token() -> None:
    module, given = mixer("text_guided"), arguments("text_guided")
    update = module(**given)
    given["text"] = given["text"] + 1
    assert (module(**given) != update).any(-1).all()


def block(kind: Any, interaction: str = "sela", **options: Any) -> VisionRemember:
    torch.manual_seed(0)
    return VisionRemember(D, 8, interaction=interaction, token_mixer=kind, **options)


def image(kind: str | None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    given: dict[str, Any] = {
        "tokens": torch.randn(B, N, D, generator=generator).to(dtype),
        "features": torch.randn(B, 24, 8, generator=generator),
        "token_grid": (2, 3),
        "feature_grid": (4, 6),
    }
    if kind == "text_guided":
        given["text"] = torch.randn(B, D, generator=generator).to(dtype)
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interaction", INTERACTIONS)
@every_kind
def test_a_new_block_with_a_mixer_is_an_exact_identity(kind: str, interaction: str, dtype: torch.dtype) -> None:
    config = VisionRememberConfig(interaction=interaction, token_mixer=kind)
    assert VisionRememberConfig.from_json(config.to_json()) == config
    module, given = VisionRemember.from_config(config, D, 8), image(kind, dtype)
    assert module.token_mixer is not None
    assert torch.equal(module(**given), given["tokens"])


@every_kind
def test_the_block_mixes_after_the_read(kind: str) -> None:
    module, given = block(kind, zero_init=False), image(kind)
    for norm in (module.norm, module.token_mixer.norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    read = VisionRemember(D, 8, zero_init=False)
    read.load_state_dict({k: x for k, x in module.state_dict().items() if not k.startswith("token_mixer.")})
    tokens = read(**{k: x for k, x in given.items() if k != "text"})
    mixed = tokens + module.token_mixer(tokens, text=given.get("text"))
    torch.testing.assert_close(module(**given), mixed)
    present = torch.ones(B, N, dtype=torch.bool)
    present[:, 1] = False
    assert not torch.allclose(module(**given, present=present)[:, 0], mixed[:, 0])


@every_kind
def test_the_paper_preset_starts_the_mixer_too(kind: str) -> None:
    config = VisionRememberConfig.from_preset("paper", token_mixer=kind)
    module = VisionRemember.from_config(config, D, 8)
    assert module.token_mixer is not None
    assert module.token_mixer.vr_out.weight.any()


def test_without_a_mixer_there_is_none() -> None:
    module = VisionRemember.from_config(VisionRememberConfig(), D, 8)
    assert not [name for name in module.state_dict() if "mixer" in name]


@every_kind
def test_no_images_leave_no_parameter_without_gradient(kind: str) -> None:
    module = block(kind)
    given = {k: x[:0] if isinstance(x, Tensor) else x for k, x in image(kind).items()}
    module(**given).sum().backward()
    assert not [name for name, parameter in module.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "present"])
@every_kind
def test_compiles_without_graph_breaks(kind: str, masked: bool) -> None:
    module, given = block(kind, zero_init=False), image(kind)
    if masked:
        given["present"] = torch.arange(N).expand(B, N) < 4
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given), module(**given))


def test_images_of_several_sizes_take_a_text_each() -> None:
    module, given = block("text_guided", zero_init=False), image("text_guided")
    lists = {k: [x[:1], x[1:]] if isinstance(x, Tensor) else [x, x] for k, x in given.items()}
    torch.testing.assert_close(torch.cat(module(**lists)), module(**given))


@every_kind
def test_linear_layers_have_no_names_that_lora_looks_for(kind: str) -> None:
    usual = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    linears = [name for name, module in mixer(kind).named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 4 + (kind == "text_guided")
    assert not [name for name in linears if name.endswith(usual)]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("text_guided", {"text": None}, r"'text_guided' needs text=, \(B, D\) = \(3, 16\)"),
        ("text_guided", {"text": torch.zeros(2, D)}, r"text \(2, 16\): expected \(B, D\) = \(3, 16\)"),
        ("self", {"text": torch.zeros(B, D)}, "token_mixer='self' has no use"),
        (None, {"text": torch.zeros(B, D)}, "this block has no token_mixer='text_guided'"),
        ("self", {"present": torch.ones(B, N)}, r"present \(3, 6\) torch.float32: expected bool"),
        ("self", {"present": torch.ones(B, N + 1, dtype=torch.bool)}, r"present \(3, 7\).*\(3, 6\)"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(kind: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block(kind)(**{**image(kind), **change})


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="token_mixer='both': expected 'self', 'text_guided' or None"):
        block("both")
