"""Ways to train a host, over hosts of every kind: Vision Remember learns in each, as the host alone does."""

from __future__ import annotations

import copy
import functools
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from packaging.version import Version
from torch import Tensor

from tests.hosts import set_checkpointing
from tests.zoo_checks import Subject, subject
from vision_remember.adapters.resolve import resolve

# peft asks transformers by a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

HOSTS = (
    *("llava_next", "llava_onevision", "internvl", "idefics3", "gemma3", "qwen2_5_vl", "qwen3_vl", "mistral3"),
    *("aya_vision", "lfm2_vl"),
)
every_host = pytest.mark.parametrize("model_type", HOSTS)


@functools.lru_cache(maxsize=1)
def host_of(model_type: str) -> Subject:
    return subject(model_type)


def gradients(host: Subject, handle: Any) -> list[Tensor]:
    """Of the blocks and of the decoder's layers, in a training step."""
    host.model.zero_grad()
    host.model.train()
    torch.manual_seed(0)
    host.model(**host.inputs, use_cache=False).logits.float().pow(2).mean().backward()
    host.model.eval()
    decoder = [p for p in host.parts.layers.parameters() if p.grad is not None]
    return [p.grad.clone() for p in (*handle.module.parameters(), *decoder) if p.grad is not None]


@every_host
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradients(model_type: str, use_reentrant: bool) -> None:
    if use_reentrant and Version(hf.__version__) < Version("5.23"):
        pytest.skip("refused there while the encoder trains; tests/test_training.py")
    host = host_of(model_type)
    handle = host.attach()
    try:
        expected = gradients(host, handle)
        set_checkpointing(host.model, use_reentrant=use_reentrant)
        made = gradients(host, handle)
    finally:
        set_checkpointing(host.model, use_reentrant=None)
        host.model.zero_grad()
        handle.detach()
    assert len(made) == len(expected) > len(list(handle.config.layers))
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-5)


@every_host
def test_bfloat16_starts_as_an_identity_and_learns(model_type: str) -> None:
    alone = host_of(model_type)
    model = copy.deepcopy(alone.model).to(torch.bfloat16)
    inputs = {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in alone.inputs.items()}
    host = Subject(model, _parts_of(model, alone), inputs, alone.alone)
    expected = host.logits()
    handle = host.attach(trained=False)
    assert torch.equal(host.logits(), expected)
    assert {p.dtype for p in handle.module.parameters()} == {torch.bfloat16}
    # The last layer of each block is zero at the start and the only one that a first step moves.
    assert any(gradient.any() for gradient in gradients(host, handle)[: len(list(handle.module.parameters()))])


@every_host
def test_autocast_is_close_to_full_precision(model_type: str) -> None:
    host = host_of(model_type)
    handle = host.attach()
    expected = host.logits()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = host.logits()
    handle.detach()
    # Rounding moves the logits far less than the blocks do.
    assert (made.float() - expected).norm() < 0.25 * (expected - host.alone).norm()


@every_host
def test_lora_around_the_host_leaves_the_blocks_to_learn(model_type: str) -> None:
    host = host_of(model_type)
    model = copy.deepcopy(host.model)
    own = Subject(model, _parts_of(model, host), host.inputs, host.alone)
    handle = own.attach()
    names = {name.rpartition(".")[2] for name, module in own.parts.layers.named_modules() if "q_proj" in name}
    assert names
    config = peft.LoraConfig(r=2, target_modules=sorted(names), modules_to_save=["vision_remember"])
    wrapped = peft.get_peft_model(model, config)
    assert not [name for name, _ in wrapped.named_parameters() if "vr_" in name and "lora_" in name]
    wrapped.train()
    wrapped(**host.inputs).logits.float().pow(2).mean().backward()
    missing = [name for name, p in handle.module.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert any(p.grad is not None for name, p in wrapped.named_parameters() if "lora_" in name)


def _parts_of(model: Any, host: Subject) -> Any:
    """The parts of a copy, without trying it again."""
    return resolve(model, host.parts.spec)
