"""No forward pass makes a tensor on the default device, which on a GPU would be another than the model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.hosts import batch, build_llava, randomise
from tests.pruning_hosts import HOSTS, build, logits, prompt
from tests.test_pruners_in_hosts import REFUSED, SMALL
from vision_remember import attach_pruner, attach_vision_remember

# draws its numbers on a CPU wherever the model is, so that they are the same on every device
DRAWN_ON_A_CPU = {"random"}


@contextmanager
def elsewhere() -> Iterator[None]:
    """Inside the ``with`` a tensor whose device nobody names has no data, and fails beside those that have."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def host_and_prompt(host: str) -> tuple[Any, dict[str, Any]]:
    """A host that names its devices itself; versions of transformers in which it does not are skipped."""
    model = build(host)
    inputs = prompt(model)
    try:
        with elsewhere():
            logits(model, inputs, use_cache=False)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"{host} alone makes tensors on the default device: {error}")
    return model, inputs


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("pruner", sorted(SMALL.keys() - DRAWN_ON_A_CPU))
def test_pruners_name_the_device(host: str, pruner: str) -> None:
    if (host, pruner) in REFUSED:
        pytest.skip(f"{host} refuses {pruner}")
    model, inputs = host_and_prompt(host)
    attach_pruner(model, pruner, **SMALL[pruner])
    expected = logits(model, inputs, use_cache=False)
    with elsewhere():
        found = logits(model, inputs, use_cache=False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"absorb": True}, {"window": 2}, *({"interaction": name} for name in ("deformable", "global", "deepstack"))],
    ids=str,
)
@pytest.mark.parametrize("host", HOSTS)
def test_blocks_name_the_device(host: str, options: dict[str, Any]) -> None:
    model, inputs = host_and_prompt(host)
    randomise(attach_vision_remember(model, layers=[1], **options))
    expected = logits(model, inputs, use_cache=False)
    with elsewhere():
        found = logits(model, inputs, use_cache=False)
    torch.testing.assert_close(found, expected)


def test_training_names_the_device() -> None:
    model = build_llava()
    inputs = batch(model, (1, 2))
    randomise(attach_vision_remember(model, layers=[1, 3]))
    with elsewhere():
        model(**inputs, use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "vision_remember" in name)


def test_an_unnamed_device_would_be_seen() -> None:
    model = build("llava")
    inputs = prompt(model)
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: ((args[0] + torch.zeros(args[0].shape[-1]),), kwargs), with_kwargs=True
    )
    with elsewhere(), pytest.raises((RuntimeError, NotImplementedError)):
        logits(model, inputs, use_cache=False).sum().item()
