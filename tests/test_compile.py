"""torch.compile: an attached model breaks into as many graphs as the host alone, and decoding stays one graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf

from tests.hosts import CACHE, batch, build_llava, randomise
from vision_remember import attach_vision_remember

LAYERS = [1, 3]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def compiled(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The logits of the compiled model, and how often its graph breaks."""
    logits(model, **inputs)  # transformers installs its own hooks in the first call
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    result = logits(torch.compile(model, backend="eager"), **inputs)
    return result, sum(torch._dynamo.utils.counters["graph_break"].values())


# The host breaks at checks of its own that read a number off a tensor (6 times with transformers 5.23), and not at all
# where torch may capture that.
@pytest.mark.parametrize("scalars", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_model_remembers_without_more_graph_breaks(scalars: bool) -> None:
    model = build_llava()
    inputs = batch(model, (1, 2))
    with torch._dynamo.config.patch(capture_scalar_outputs=scalars):
        try:
            plain, breaks = compiled(model, inputs)
        except Exception as error:
            pytest.skip(f"torch {torch.__version__} cannot compile the host alone: {type(error).__name__}")
        handle = attach_vision_remember(model, LAYERS)
        randomise(handle)
        remembered, breaks_attached = compiled(model, inputs)
    assert breaks_attached == breaks
    torch.testing.assert_close(remembered, logits(model, **inputs))
    assert not torch.allclose(remembered, plain, atol=0.01)


def test_decoding_is_one_graph() -> None:
    model = build_llava()
    randomise(attach_vision_remember(model, LAYERS))
    inputs = batch(model, (1, 2))
    length = inputs["input_ids"].shape[1]
    del inputs["attention_mask"]

    def steps(forward: Any) -> torch.Tensor:
        cache = hf.StaticCache(config=model.config.get_text_config(), max_cache_len=length + 4)
        found = [logits(model, **inputs, **{CACHE: cache})[:, -1:]]
        for step in range(3):
            with torch.no_grad():
                positions = torch.tensor([length + step])
                token = found[-1].argmax(-1)
                found.append(forward(input_ids=token, **{CACHE: cache}, position_ids=positions[None]).logits)
        return torch.cat(found, 1)

    expected = steps(model)
    torch.testing.assert_close(steps(torch.compile(model, backend="eager", fullgraph=True)), expected)
