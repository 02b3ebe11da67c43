"""Learning rates of the parts: every trained parameter is in one group, with the rate and decay of its part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hosts import build_llava, set_checkpointing
from tests.zoo_checks import subject
from vision_remember import attach_vision_remember
from vision_remember.adapters.handle import VisionRememberHandle

POSITIONS = "interaction.position"


def attached(phase: Any, **options: Any) -> tuple[Any, VisionRememberHandle]:
    model = build_llava()
    handle = attach_vision_remember(model, [1, 3])
    handle.set_phase(phase, **options)
    return model, handle


def part_of(name: str) -> str:
    parts = {"vision_remember": "Vision Remember", "multi_modal_projector": "projector", "vision_tower": "encoder"}
    return next((part for word, part in parts.items() if word in name), "language model")


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("phase", "encoder"), [(1, False), (2, False), (2, True)])
def test_each_trained_parameter_has_the_rate_of_its_part(phase: int, encoder: bool, decay: float) -> None:
    model, handle = attached(phase, train_encoder=encoder)
    rates = {"language model": 1.0, "Vision Remember": 2.0, "projector": 3.0, "encoder": 4.0}
    encoder_lr = 4.0 if encoder else None
    groups = handle.parameter_groups(1.0, vr_lr=2.0, projector_lr=3.0, encoder_lr=encoder_lr, weight_decay=decay)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(p.ndim > 1 for name, p in trained.items() if name.endswith(POSITIONS))
    assert len(trained) == len(found)
    for name, parameter in trained.items():
        group = found[id(parameter)]
        assert (group["name"], group["lr"]) == (part_of(name), rates[part_of(name)])
        assert group["weight_decay"] == (decay if parameter.ndim > 1 and not name.endswith(POSITIONS) else 0.0)
    torch.optim.AdamW(groups)


def test_a_part_without_a_rate_has_the_common_one() -> None:
    groups = attached(2)[1].parameter_groups(0.5)
    assert {group["lr"] for group in groups} == {0.5}
    assert {group["name"] for group in groups} == {"language model", "Vision Remember", "projector"}


def test_a_rate_for_what_does_not_train_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a learning rate of 0\.1 for the encoder, which does not train"):
        attached(2)[1].parameter_groups(1.0, encoder_lr=0.1)


def test_nothing_to_train_is_an_error() -> None:
    model, handle = attached(1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of this model trains"):
        handle.parameter_groups(1.0)


def test_a_projector_inside_the_encoder_is_no_part_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen-VL's: the merger is the projector, and trains while the encoder is frozen."""
    host = subject("qwen2_5_vl")
    handle = host.attach()
    handle.set_phase(1)
    assert "encoder" not in capsys.readouterr().out
    groups = handle.parameter_groups(1.0)
    assert [group["name"] for group in groups] == ["Vision Remember", "projector"]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in host.parts.projector.parameters()}
    torch.optim.AdamW(groups)  # refuses a parameter in two groups
    with pytest.raises(ValueError, match="for the encoder, which does not train"):
        handle.parameter_groups(1.0, encoder_lr=0.1)
    assert sum(handle.parameter_counts().values()) == sum(p.numel() for p in host.model.parameters())

    given: list[Any] = []
    read = handle.module[str(handle.config.layers[0])].interaction
    read.register_forward_pre_hook(lambda module, args: given.append(args[1]))
    set_checkpointing(host.model, use_reentrant=False)  # makes inputs of frozen parts require gradients
    host.model.train()(**host.inputs, use_cache=False)
    assert given
    assert not any(level.requires_grad for level in given[0])


@pytest.mark.parametrize(
    ("model_type", "other"),
    [("video_llava", "video_tower"), ("qwen2_5_omni_thinker", "audio_tower"), ("janus", "vqmodel")],
)
def test_encoders_beside_the_vision_encoder_are_no_part_of_the_language_model(model_type: str, other: str) -> None:
    """They stay frozen with it: nothing of a batch with images alone would give them a gradient."""
    host = subject(model_type)
    handle = host.attach()
    parameters = [p for name, p in host.model.named_parameters() if other in name]
    assert parameters
    handle.set_phase(2)
    assert not any(p.requires_grad for p in parameters)
    assert any(p.requires_grad for p in host.parts.decoder.parameters())
    handle.set_phase(2, train_encoder=True)
    assert all(p.requires_grad for p in parameters)
    groups = handle.parameter_groups(1.0)
    torch.optim.AdamW(groups)
    assert {id(p) for p in parameters} <= {id(p) for g in groups if g["name"] == "encoder" for p in g["params"]}
