"""End tokens: learned, behind those of the image, counted by whoever counts."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from tests.hosts import IMAGE_TOKEN, randomise
from tests.test_compress import ask, real_sized
from vision_remember import PROJECTORS, attach_vision_remember, build_projector, compress_projector

ENDED = [name for name, cls in PROJECTORS.items() if "end_tokens" in inspect.signature(cls).parameters]

with_end_tokens = pytest.mark.parametrize("name", ENDED)


def projector(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_projector(name, 16, 24, ratio=4, **options).eval()


def test_honeybees_projectors_have_them() -> None:
    assert ENDED == ["c_abstractor", "d_abstractor", "honeybee_resampler"]


@with_end_tokens
def test_they_follow_the_image_and_change_none_of_its_tokens(name: str) -> None:
    module, plain = projector(name, end_tokens=3), projector(name)
    loaded = plain.load_state_dict(module.state_dict(), strict=False)
    assert loaded.unexpected_keys == ["end.tokens"]
    assert not loaded.missing_keys
    given = torch.randn(2, 48, 16, generator=torch.Generator().manual_seed(1))
    tokens, without = module(given, (6, 8)), plain(given, (6, 8))
    torch.testing.assert_close(tokens[:, :12], without)
    assert tokens.shape == (2, 15, 24)
    assert torch.equal(tokens[0, 12:], tokens[1, 12:])
    assert not torch.allclose(tokens[0, 12], tokens[0, 13])
    assert (module.num_tokens((6, 8)), plain.num_tokens((6, 8))) == (15, 12)
    assert module.out_grid((6, 8)) == (3, 4)
    tokens.sum().backward()
    assert module.end.tokens.grad.any()


@with_end_tokens
def test_options_and_state_build_an_equal_projector(name: str) -> None:
    module = projector(name, end_tokens=2)
    again = build_projector(name, 16, 24, **module.options()).eval()
    again.load_state_dict(module.state_dict(), strict=True)
    given = torch.randn(1, 36, 16)
    assert torch.equal(again(given), module(given))
    assert again.options() == module.options()


@with_end_tokens
def test_a_negative_number_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="end_tokens=-1"):
        projector(name, end_tokens=-1)


@with_end_tokens
def test_the_processor_counts_them(name: str) -> None:
    model, processor = real_sized("clip")
    options = {} if name == "c_abstractor" else {"num_heads": 2, "num_layers": 1}
    handle = compress_projector(model, processor, name, ratio=4, end_tokens=2, **options)
    inputs = ask(processor, 2)
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == 2 * 146
    with torch.no_grad():
        model(**inputs)  # raises if placeholders and features disagree
    assert str(handle).endswith("12x12 = 144 tokens per image and 2 at the end")
    expected = logits(model, inputs)
    attached = attach_vision_remember(model, [0])
    assert torch.equal(logits(model, inputs), expected)
    randomise(attached)
    seen: list[torch.Tensor] = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=True)
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, inputs)
    changed = (seen[0] != seen[1]).any(-1)
    expected = inputs["input_ids"] == IMAGE_TOKEN
    expected[expected.clone()] = (torch.arange(146) < 144).repeat(2)
    assert torch.equal(changed, expected)


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits
