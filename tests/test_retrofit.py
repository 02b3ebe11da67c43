"""Projectors and fusions with every interaction, on LLaVA: each trains, generates, saves and comes back."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hosts import IMAGE_TOKEN, batch, build_llava, image_side
from tests.processors import llava_processor
from vision_remember import (
    FUSIONS,
    INTERACTIONS,
    PROJECTORS,
    attach_vision_remember,
    compress_projector,
    load_vision_remember,
)

RETROFITS = [name for name, cls in PROJECTORS.items() if not cls.needs_text]


@pytest.mark.parametrize(("projector", "interaction"), list(itertools.product(RETROFITS, INTERACTIONS)))
def test_projectors_train_generate_and_come_back(projector: str, interaction: str, tmp_path: Path) -> None:
    check_retrofit(projector, tmp_path, interaction=interaction)


@pytest.mark.parametrize(("fusion", "interaction"), list(itertools.product(FUSIONS, INTERACTIONS)))
def test_fusions_train_generate_and_come_back(fusion: str, interaction: str, tmp_path: Path) -> None:
    handle = check_retrofit("adaptive_avg_pool", tmp_path, interaction=interaction, fusion=fusion)
    assert type(handle.module["1"].interaction.fusion) is FUSIONS[fusion]


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_a_token_mixer_trains_generates_and_comes_back(interaction: str, tmp_path: Path) -> None:
    handle = check_retrofit("adaptive_avg_pool", tmp_path, interaction=interaction, token_mixer="self")
    assert handle.module["1"].token_mixer.vr_out.weight.any()


def check_retrofit(projector: str, tmp_path: Path, **options: Any) -> Any:
    """The handle, after training; ``options`` are the attachment's."""
    model = build_llava()
    processor = llava_processor("clip", image_side(model), model.config.vision_config.patch_size)
    torch.manual_seed(0)
    swapped = compress_projector(model, processor, projector, ratio=1 if projector == "mlp" else 4)
    inputs = batch(model, (1, 2))
    with torch.no_grad():
        plain = model(**inputs).logits
        handle = attach_vision_remember(model, [1, 3], **options)
        assert torch.equal(model(**inputs).logits, plain)
    handle.set_phase(1)

    model.train()
    parameters = [*handle.trainable_parameters(), *swapped.projector.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[2] < losses[1] < losses[0]

    model.eval()
    generate = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
    expected = model.generate(**inputs, **generate)
    handle.save_pretrained(tmp_path)
    twin = build_llava()
    load_vision_remember(
        twin, tmp_path, llava_processor("clip", image_side(twin), twin.config.vision_config.patch_size)
    )
    assert torch.equal(twin.generate(**inputs, **generate), expected)
    with torch.no_grad():
        torch.testing.assert_close(twin(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
    return handle


@pytest.mark.parametrize("projector", [name for name in PROJECTORS if name not in RETROFITS])
def test_projectors_that_need_the_question_say_so(projector: str) -> None:
    model = build_llava()
    with pytest.raises(ValueError, match="needs the question"):
        compress_projector(model, None, projector, ratio=4)
