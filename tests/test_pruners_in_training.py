"""Pruned models that train: losses, activation checkpointing, PEFT, autocast."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests.hosts import IMAGE_TOKEN, set_checkpointing
from tests.pruning_hosts import build, logits, prompt
from tests.test_pruners_at_work import every_pruner, pruned
from tests.test_pruners_in_hosts import CLOSE, SMALL
from vision_remember import attach_pruner
from vision_remember.adapters.activation_checkpointing import HOOKS_STAY_OUTSIDE
from vision_remember.adapters.encoder_attention import patch_attention
from vision_remember.adapters.encoders import encoder_spec


@every_pruner
def test_a_loss_trains_through_what_is_left(name: str) -> None:
    model, _ = pruned(name)
    inputs = prompt(model)
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE_TOKEN) | (inputs["input_ids"] == 0), -100)
    out = model.train()(**inputs, labels=labels)
    out.loss.backward()
    assert out.logits.shape[:2] == labels.shape
    for part in (model.model.multi_modal_projector, model.model.language_model.layers[3]):
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in part.parameters())
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


@every_pruner
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant: bool, name: str) -> None:
    model, _ = pruned(name)
    inputs = prompt(model)
    model.train()
    wanted = _gradients(model, inputs)
    set_checkpointing(model.model.language_model, use_reentrant=use_reentrant)
    if not HOOKS_STAY_OUTSIDE:
        with pytest.raises(RuntimeError, match="runs a pruner's hooks again in the backward pass"):
            _gradients(model, inputs)
        return
    found = _gradients(model, inputs)
    assert found.keys() == wanted.keys()
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[parameter], atol=1e-5, rtol=1e-4)


def _gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of the decoder."""
    model.zero_grad()
    model(**inputs).logits[:, -1].square().mean().backward()
    return {n: p.grad.clone() for n, p in model.model.language_model.named_parameters() if p.grad is not None}


# PEFT asks for names that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["fastv", "vision_zip"])
def test_peft_around_a_pruned_model(name: str) -> None:
    """Attached before or after, with and without the adapter."""
    config = peft.LoraConfig(target_modules=r".*language_model.*(q_proj|k_proj)", init_lora_weights=False)
    torch.manual_seed(0)
    inside = peft.get_peft_model(pruned(name)[0], config)
    torch.manual_seed(0)
    outside = peft.get_peft_model(build("llava"), config)
    outside.load_state_dict(inside.state_dict())
    handle = attach_pruner(outside, name, **SMALL[name])
    inputs = prompt(outside)
    torch.testing.assert_close(logits(inside, inputs), logits(outside, inputs))
    with outside.disable_adapter():
        torch.testing.assert_close(logits(outside, inputs), logits(pruned(name)[0], inputs))
    before = logits(outside, inputs)
    handle.detach()
    assert not torch.allclose(logits(outside, inputs), before, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["faster_vlm", "vision_zip", "prumerge", "tome", "fastv"])
def test_a_projector_that_peft_copies_after_attaching_is_followed(name: str) -> None:
    """And the copy is one of the projector alone, not of the whole model by way of a hook."""
    model, _ = pruned(name)
    inputs = prompt(model)
    expected = logits(model, inputs)
    assert not copy.deepcopy(model.model.multi_modal_projector)._forward_pre_hooks
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    trained = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(logits(trained, inputs), expected, **CLOSE)


@every_pruner
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_choice_by_itself(dtype: torch.dtype, name: str) -> None:
    """What is compared is as precise as without: scores differ by what the model's own layers round."""
    model, handle = pruned(name)
    inputs = prompt(model)
    expected, left = logits(model, inputs), handle.tokens_per_layer
    with torch.autocast("cpu", dtype=dtype):
        found = logits(model, inputs)
    assert left is not None
    assert handle.tokens_per_layer is not None
    assert (handle.tokens_per_layer - left).abs().max() <= (2 if name == "sparse_vlm" else 0)
    assert (found - expected)[:, -1].abs().max() < 0.3


def test_attention_that_decides_is_not_narrowed_by_autocast() -> None:
    """Of projections that autocast does not touch: what is left is the product of queries and keys."""
    tower = build("llava").model.vision_tower
    block, hidden = tower.encoder.layers[2], torch.randn(2, 65, 32)
    expected, _ = patch_attention(block, encoder_spec(tower), hidden, heads=True)
    for linear in (block.self_attn.q_proj, block.self_attn.k_proj):
        linear.forward = torch.autocast("cpu", enabled=False)(linear.forward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = patch_attention(block, encoder_spec(tower), hidden, heads=True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
