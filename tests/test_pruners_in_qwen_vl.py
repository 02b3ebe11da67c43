"""Pruners in hosts with three kinds of positions (M-RoPE) and images of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import pruning_oracle as oracle
from tests.pruning_hosts import logits
from tests.test_pruners_in_hosts import CLOSE, DECODER_SIDE, STEPS, every_reader
from tests.zoo import build_host, call_inputs, extended
from vision_remember import attach_pruner
from vision_remember.adapters.resolve import resolve

every_host = pytest.mark.parametrize("host", ["qwen2_vl", "qwen2_5_vl"])


def prompt(model: Any) -> dict[str, Any]:
    return call_inputs(model, resolve(model))


@every_reader
@every_host
def test_dropping_equals_hiding_also_with_a_cache(host: str, name: str) -> None:
    model = build_host(host)
    inputs = prompt(model)
    options, stages, choose = DECODER_SIDE[name]
    alive = oracle.survivors(model, inputs, stages, choose)
    wanted = oracle.run(model, inputs, alive).logits
    longer, left, steps = inputs, alive, []
    for _ in range(STEPS):
        steps.append(oracle.run(model, longer, left).logits[:, -1])
        ids = torch.cat([longer["input_ids"], _words(model, steps[-1]).argmax(-1, keepdim=True)], 1)
        longer = extended(model, inputs, ids)
        left = {layer: torch.cat([kept, torch.ones_like(kept[:, :1])], 1) for layer, kept in left.items()}
    before = logits(model, inputs)
    attach_pruner(model, name, **options)
    found = logits(model, inputs)
    here = alive[max(alive)]
    torch.testing.assert_close(found[here], wanted[here], **CLOSE)
    assert not torch.allclose(found[:, -1], before[:, -1], atol=1e-2)
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        suppress_tokens=_special(model),
        output_logits=True,
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(steps), **CLOSE)


@every_host
def test_images_of_any_size_leave_nothing_to_pruners_of_the_encoder(host: str) -> None:
    with pytest.raises(ValueError, match="has no fixed grid of image tokens for a pruner of the encoder"):
        attach_pruner(build_host(host), "faster_vlm")


def _special(model: Any) -> list[int]:
    """Ids that the host would take for more images, or for the end."""
    config = model.config
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    known = [getattr(config, name, None) for name in names]
    ends = model.generation_config.eos_token_id
    return [token for token in [*known, *(ends if isinstance(ends, list) else [ends])] if token is not None]


def _words(model: Any, scores: torch.Tensor) -> torch.Tensor:
    return scores.index_fill(1, torch.tensor(_special(model)), -torch.inf)
