"""The example of a hand-written model, as a user runs it."""

from __future__ import annotations

import inspect

import torch

from examples import custom_mllm
from tests.hosts import randomise


def test_the_example_trains_and_attaching_takes_fewer_than_25_lines() -> None:
    losses = custom_mllm.main(steps=30)
    assert losses[-1] < losses[0] / 2
    assert len(inspect.getsource(custom_mllm.remember).splitlines()) < 25


def test_it_starts_as_an_identity_and_generates_as_the_full_forward_does() -> None:
    model = custom_mllm.build().eval()
    ids = torch.tensor([[1] + [63] * 16 + [2]])
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, pixels).logits
        handle = custom_mllm.remember(model)
        assert torch.equal(model(ids, pixels).logits, expected)
        randomise(handle)
        assert not torch.allclose(model(ids, pixels).logits, expected, atol=1e-3)
        made = model.generate(ids, pixels, max_new_tokens=4)
        for count in range(4):
            longer = torch.cat([ids, made[:, :count]], 1)
            assert model(longer, pixels).logits[0, -1].argmax() == made[0, count]
