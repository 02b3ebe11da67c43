"""A host with Vision Remember on a GPU: it computes what a CPU computes, waits for nothing, and fits a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from benchmarks.speed.hosts import placeholder_mask
from tests.hosts import IMAGE_TOKEN, batch, build_llava, randomise
from vision_remember import attach_vision_remember, compress_projector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"absorb": True},
    {"backend": "windowed"},
    {"interaction": "global"},
    {"interaction": "deformable"},
    {"interaction": "deepstack"},
]


def attached(*, side_stream: bool = False, **options: Any) -> Any:
    """A small LLaVA on the CPU, its blocks random."""
    backend = options.pop("backend", "auto")
    model = build_llava()
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    handle = attach_vision_remember(model, [1, 3], **options)
    randomise(handle)
    handle.side_stream = side_stream
    for block in handle.module.values() if backend != "auto" else ():
        block.interaction.backend = backend
    return model.eval()


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def prefill_inputs(model: Any) -> dict[str, Tensor]:
    """Of sequences without padding, so that no mask is needed."""
    inputs = on_gpu(batch(model, (2,)))
    assert inputs.pop("attention_mask").all()
    return inputs


@pytest.fixture
def without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host compares the numbers of image tokens and features, for which it waits."""
    monkeypatch.setattr(hf.LlavaModel, "get_placeholder_mask", placeholder_mask)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_and_gradients_are_those_of_a_cpu(options: dict[str, Any]) -> None:
    here, there = attached(**options), attached(**options).cuda()
    inputs = batch(here)
    kept = inputs["attention_mask"].bool()
    expected, found = here(**inputs).logits[kept], there(**on_gpu(inputs)).logits[kept.cuda()]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
    expected.square().mean().backward()
    found.square().mean().backward()
    wanted = dict(here.named_parameters())
    compared = 0
    for name, parameter in there.named_parameters():
        own = wanted[name].grad
        if ".vision_remember." in name and own is not None:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.cpu(), own, rtol=1e-2, atol=1e-3 * own.abs().max().item())
            compared += 1
    assert compared


@pytest.mark.parametrize("side_stream", [False, True], ids=["one stream", "side stream"])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_generate_gives_the_tokens_of_a_cpu(options: dict[str, Any], side_stream: bool) -> None:
    here, there = attached(**options), attached(**options, side_stream=side_stream).cuda()
    inputs = batch(here)
    common = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
    with torch.no_grad():
        expected = here.generate(**inputs, **common)
        found = there.generate(**on_gpu(inputs), **common)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.usefixtures("without_checks")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_prefill_never_waits(options: dict[str, Any]) -> None:
    model = attached(**options).cuda()
    inputs = prefill_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits  # libraries set themselves up in the first call
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = model(**inputs).logits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("without_checks")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_cuda_graph_holds_the_whole_prefill(options: dict[str, Any]) -> None:
    model = attached(**options).cuda()
    inputs = prefill_inputs(model)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            model(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(**inputs).logits
        inputs["pixel_values"].normal_()
        graph.replay()
        torch.testing.assert_close(captured, model(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learning", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_autocast_comes_close(options: dict[str, Any], learning: bool) -> None:
    model = attached(**options).cuda()
    inputs = prefill_inputs(model)
    with torch.set_grad_enabled(learning):
        exact = model(**inputs, labels=inputs["input_ids"]).loss
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(loss, exact, atol=0.1, rtol=0.05, check_dtype=False)
