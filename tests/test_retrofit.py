"""Every projector with every interaction, on LLaVA: trains, generates, saves and comes back."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.hosts import IMAGE_TOKEN, batch, build_llava, image_side
from tests.processors import llava_processor
from vision_remember import (
    INTERACTIONS,
    PROJECTORS,
    attach_vision_remember,
    compress_projector,
    load_vision_remember,
)

RETROFITS = [name for name, cls in PROJECTORS.items() if not cls.needs_text]


@pytest.mark.parametrize(("projector", "interaction"), list(itertools.product(RETROFITS, INTERACTIONS)))
def test_it_trains_generates_and_comes_back(projector: str, interaction: str, tmp_path: Path) -> None:
    model = build_llava()
    processor = llava_processor("clip", image_side(model), model.config.vision_config.patch_size)
    torch.manual_seed(0)
    swapped = compress_projector(model, processor, projector, ratio=1 if projector == "mlp" else 4)
    handle = attach_vision_remember(model, [1, 3], interaction=interaction)
    handle.set_phase(1)
    inputs = batch(model, (1, 2))

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
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
    expected = model.generate(**inputs, **options)
    handle.save_pretrained(tmp_path)
    twin = build_llava()
    load_vision_remember(
        twin, tmp_path, llava_processor("clip", image_side(twin), twin.config.vision_config.patch_size)
    )
    assert torch.equal(twin.generate(**inputs, **options), expected)
    with torch.no_grad():
        torch.testing.assert_close(twin(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projector", [name for name in PROJECTORS if name not in RETROFITS])
def test_projectors_that_need_the_question_say_so(projector: str) -> None:
    model = build_llava()
    with pytest.raises(ValueError, match="needs the question"):
        compress_projector(model, None, projector, ratio=4)
