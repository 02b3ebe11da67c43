"""Training an attached model: gradients, activation checkpointing, text-only steps, LoRA-free plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from tests.fingerprint import structure
from tests.hosts import PAIRINGS, batch, build_llava, randomise, set_checkpointing
from vision_remember import attach_vision_remember, compress_projector, detach_vision_remember
from vision_remember.adapters.activation_checkpointing import HOOKS_STAY_OUTSIDE


def prepared(decoder: str, encoder: str, *, train_encoder: bool = False) -> Any:
    model = build_llava(decoder, encoder).train()
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    handle = attach_vision_remember(model, [1, 3])
    randomise(handle)
    handle.set_phase(2, train_encoder=train_encoder)
    return model


def gradients(model: Any, *batches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of all steps together: every forward before the first backward."""
    model.zero_grad()
    losses = [model(**inputs, labels=inputs["input_ids"]).loss for inputs in batches]
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("train_encoder", [False, True], ids=["frozen encoder", "trained encoder"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("decoder", "encoder"), PAIRINGS)
def test_checkpointing_gives_the_same_gradients(
    decoder: str, encoder: str, use_reentrant: bool, train_encoder: bool
) -> None:
    model = prepared(decoder, encoder, train_encoder=train_encoder)
    steps = batch(model, (1, 2, 0)), batch(model, (0,), seed=1), batch(model, (2,), seed=2)
    expected = gradients(model, *steps)
    set_checkpointing(model, use_reentrant=use_reentrant)
    blocks = [layer.vision_remember for layer in model.model.language_model.layers if hasattr(layer, "vision_remember")]
    assert all(block.gradient_checkpointing for block in blocks)
    if use_reentrant and train_encoder and not HOOKS_STAY_OUTSIDE:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            gradients(model, *steps)
        return
    actual = gradients(model, *steps)
    assert actual.keys() == expected.keys()
    assert any("vision_remember" in name for name in actual)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_torch_s_own_checkpointing_wraps_layers_with_blocks() -> None:
    """As accelerate does for FSDP; detaching takes the blocks out of the wrapped layers."""
    model = prepared("qwen2", "clip")
    model.config.text_config.use_cache = False  # wrapped layers would fill a cache twice, attached or not
    steps = batch(model, (1, 2, 0)), batch(model, (0,), seed=1)
    expected = gradients(model, *steps)
    detached = build_llava().train()
    compress_projector(detached, None, "adaptive_avg_pool", ratio=4)
    kind = type(model.model.language_model.layers[0])
    for each in (model, detached):
        apply_activation_checkpointing(each, check_fn=lambda module: isinstance(module, kind))
    actual = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(model, *steps).items()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    detach_vision_remember(model)
    assert structure(model)["modules"] == structure(detached)["modules"]


def test_checkpointing_switched_on_before_attach_reaches_the_blocks() -> None:
    model = build_llava().train()
    set_checkpointing(model, use_reentrant=False)
    handle = attach_vision_remember(model, [1])
    assert handle.module["1"].gradient_checkpointing
    set_checkpointing(model, use_reentrant=None)
    assert not handle.module["1"].gradient_checkpointing


@pytest.mark.parametrize(("decoder", "encoder"), PAIRINGS)
def test_every_parameter_of_the_blocks_gets_a_gradient(decoder: str, encoder: str) -> None:
    model = prepared(decoder, encoder)
    grads = gradients(model, batch(model))
    for name, parameter in model.named_parameters():
        if "vision_remember" in name:
            assert grads[name].abs().sum() > 0, name
        assert (name in grads) == parameter.requires_grad


def test_a_step_without_images_gives_the_blocks_zero_gradients() -> None:
    """Processes that train together need a gradient of every parameter in every step."""
    model = prepared("qwen2", "clip")
    with_blocks = gradients(model, batch(model, (0, 0)))
    blocks = [name for name, _ in model.named_parameters() if "vision_remember" in name]
    assert all(torch.equal(with_blocks[name], torch.zeros_like(with_blocks[name])) for name in blocks)


def test_features_train_the_encoder_through_the_blocks_alone() -> None:
    model = prepared("qwen2", "clip", train_encoder=True)
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: (args[0].detach(),))
    grads = gradients(model, batch(model))
    assert grads["model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"].abs().sum() > 0


def test_a_few_steps_from_the_identity_lower_the_loss() -> None:
    model = build_llava("qwen2", "clip").train()
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    handle = attach_vision_remember(model, [1, 3])
    handle.set_phase(1)
    optimiser = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    inputs = batch(model)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_autocast_trains_float32_blocks() -> None:
    model = prepared("qwen2", "clip")
    inputs = batch(model)
    exact = model(**inputs, labels=inputs["input_ids"]).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        with torch.no_grad():
            evaluated = model(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(loss, exact, atol=0.1, rtol=0.05, check_dtype=False)
    torch.testing.assert_close(evaluated, loss.detach(), atol=0.05, rtol=0.05)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for n, p in model.named_parameters() if "vision_remember" in n)
