"""A projector that needs the question, in a hand-written host that has it, with every interaction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.hosts import CACHE, DECODER_CONFIGS, ENCODER_CONFIGS, IMAGE_TOKEN
from vision_remember import (
    INTERACTIONS,
    PROJECTORS,
    MLLMSpec,
    attach_vision_remember,
    build_projector,
    load_vision_remember,
)
from vision_remember.encoder import scale_levels

ASKING = [name for name, cls in PROJECTORS.items() if cls.needs_text]
SPEC = MLLMSpec(
    name="asking",
    base="",
    encoder="eyes",
    projector="bridge",
    decoder="mouth.model",
    image_token_id="placeholder",
    plain=True,
)


class Asking(nn.Module):
    """The question's vector is the language model's last state at its end, without the image."""

    placeholder = IMAGE_TOKEN

    def __init__(self, projector: str) -> None:
        super().__init__()
        self.eyes = hf.CLIPVisionModel(ENCODER_CONFIGS["clip"]())
        self.mouth = hf.AutoModelForCausalLM.from_config(DECODER_CONFIGS["qwen2"]())
        self.bridge = build_projector(projector, 32, 48, ratio=16)
        self.levels = scale_levels(self.bridge.encoder_levels, 6)

    def get_image_features(self, pixel_values: Tensor, question: Tensor) -> Tensor:
        states = self.eyes(pixel_values, output_hidden_states=True).hidden_states
        return self.bridge(torch.cat([states[level][:, 1:] for level in self.levels], -1), text=question)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, question_ids: Tensor, **kwargs: Any) -> Any:
        question = self.mouth.model(question_ids).last_hidden_state[:, -1]
        tokens = self.get_image_features(pixel_values, question)
        embeddings = self.mouth.get_input_embeddings()(input_ids)
        embeddings = embeddings.masked_scatter((input_ids == self.placeholder)[..., None], tokens)
        return self.mouth(inputs_embeds=embeddings, **kwargs)


def build(projector: str) -> Any:
    torch.manual_seed(0)
    return Asking(projector).eval()


def inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[3] + [IMAGE_TOKEN] * 4 + [4, 5, 6]] * 2)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": pixels, "question_ids": torch.tensor([[7, 8], [9, 10]])}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("projector", ASKING)
def test_it_trains_answers_and_comes_back(projector: str, interaction: str, tmp_path: Path) -> None:
    model = build(projector)
    plain = logits(model)
    handle = attach_vision_remember(model, [1, 3], spec=SPEC, interaction=interaction)
    assert torch.equal(logits(model), plain)
    handle.set_phase(1)
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    labels = torch.where(inputs()["input_ids"] == IMAGE_TOKEN, -100, inputs()["input_ids"])
    losses = []
    for _ in range(3):
        loss = model(**inputs(), labels=labels).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[2] < losses[1] < losses[0]
    model.eval()
    expected = logits(model)
    other = {**inputs(), "question_ids": inputs()["question_ids"] + 1}
    with torch.no_grad():
        assert not torch.allclose(model(**other).logits, expected, atol=1e-5)
        first = model(**inputs(), use_cache=True)
        step = model.mouth(torch.tensor([[11], [12]]), **{CACHE: first[CACHE]}).logits
    longer = {**inputs(), "input_ids": torch.cat([inputs()["input_ids"], torch.tensor([[11], [12]])], 1)}
    with torch.no_grad():
        torch.testing.assert_close(step[:, -1], model(**longer).logits[:, -1], rtol=1e-4, atol=1e-5)
    handle.save_pretrained(tmp_path)
    twin = build(projector)
    load_vision_remember(twin, tmp_path)
    torch.testing.assert_close(logits(twin), expected)
