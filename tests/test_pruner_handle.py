"""The handle of a pruner, and what attaching refuses."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from tests.fingerprint import Fingerprint
from tests.hosts import CACHE, DECODER_CONFIGS, batch, build_llava, skip_if_the_host_fails
from tests.pruning_hosts import build, logits, prompt
from tests.test_pruners_at_work import every_pruner, pruned, steps
from tests.test_pruners_in_hosts import SMALL
from tests.zoo import build_host, call_inputs
from vision_remember import attach_pruner, attach_vision_remember, compress_projector
from vision_remember.adapters.resolve import resolve


def test_the_table_says_what_was_dropped_where() -> None:
    model, handle = pruned("fastv")
    assert handle.tokens_per_layer is None
    assert "no image has passed yet" in repr(handle)
    logits(model, prompt(model))
    lines = repr(handle).splitlines()
    assert lines[0] == "pruner fastv"
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "host LlavaForConditionalGeneration",
        "decoder model.language_model, 4 layers",
        "method FastV (arXiv 2403.06764)",
        "layer 2",
        "keep 0.5",
        "drops before decoder layers 2",
        "tokens, sample 0 64 in layers 0-1; 32 in layers 2-3",
        "tokens, sample 1 128 in layers 0-1; 64 in layers 2-3",
        "tokens, sample 2 0 in layers 0-3",
    ]
    assert "as chosen in the vision encoder" in repr(attach_pruner(build("llava"), "tome"))


def test_one_at_a_time() -> None:
    model, handle = pruned("fastv")
    with pytest.raises(RuntimeError, match="a pruner is attached to this model already"):
        attach_pruner(model, "uniform")
    with pytest.raises(
        RuntimeError, match="a pruner is attached to this model, and the blocks need every vision token"
    ):
        attach_vision_remember(model, [1])
    handle.detach()
    remember = attach_vision_remember(model, [1])
    with pytest.raises(RuntimeError, match="Vision Remember is attached to this model"):
        attach_pruner(model, "fastv")
    remember.detach()
    attach_pruner(model, "uniform").detach()


def test_disabled_nests_and_detaching_twice_does_no_harm() -> None:
    model, handle = pruned("uniform")
    inputs = prompt(model)
    dropped = logits(model, inputs)
    with handle.disabled():
        whole = logits(model, inputs)
        with handle.disabled():
            pass
        assert torch.equal(logits(model, inputs), whole)
    assert torch.equal(logits(model, inputs), dropped)
    assert not torch.equal(dropped, whole)
    handle.detach()
    handle.detach()
    assert torch.equal(logits(model, inputs), whole)


@pytest.mark.parametrize("name", ["fastv", "uniform"])
def test_a_compressed_projector_goes_with_pruners_of_the_decoder(name: str) -> None:
    model = build("llava")
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    with pytest.raises(ValueError, match="compress_projector has made this host's tokens fewer already"):
        attach_pruner(model, "faster_vlm")
    handle = attach_pruner(model, name, **SMALL[name])
    logits(model, batch(model))
    assert handle.tokens_per_layer is not None
    assert handle.tokens_per_layer[-1].tolist() == [8, 16, 0]


@pytest.mark.parametrize("name", ["vision_zip", "tome"])
def test_the_projector_under_a_pruner_of_the_encoder_is_not_compressed(name: str) -> None:
    model, _ = pruned(name)
    inputs = prompt(model)
    expected, state = logits(model, inputs), Fingerprint(model)
    with pytest.raises(RuntimeError, match=f"the pruner {name} is attached.*detach it first"):
        compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    state.check(model)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize(
    ("decoder", "name", "message"),
    [
        ("gemma2", "uniform", "vision tokens can be dropped between the layers of .*is 'gemma2'"),
        ("phi3", "fastv", "is known for llama, mistral, qwen2, .*, not for 'phi3'"),
        ("qwen2", "pyramid", "did you mean 'pyramid_drop'"),
    ],
)
def test_hosts_that_do_not_fit_are_refused_untouched(decoder: str, name: str, message: str) -> None:
    model = build("llava", decoder)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        attach_pruner(model, name)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_layers_with_a_window_are_refused() -> None:
    config = DECODER_CONFIGS["qwen2"]().to_dict()
    config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": None}
    model = build("llava")
    model.model.language_model.config = hf.Qwen2Config(**config)
    with pytest.raises(ValueError, match="this decoder has layers of sliding_attention"):
        attach_pruner(model, "uniform")


def test_prumerge_says_that_it_needs_a_cls_token() -> None:
    with pytest.raises(ValueError, match="goes by the CLS token, and SiglipVisionModel has none: faster_vlm"):
        attach_pruner(build_llava("qwen2", "siglip"), "prumerge")


def test_guesses_that_the_choice_depended_on_are_refused() -> None:
    cache = hf.DynamicCache()
    model, _ = pruned("fastv")
    with torch.no_grad():
        model(**prompt(model), **{CACHE: cache}, use_cache=True)
    with pytest.raises(ValueError, match="pruners that do not read the prompt"):
        cache.crop(-1)


@pytest.mark.parametrize("name", ["fastv", "uniform"])
def test_pruners_of_the_decoder_refuse_chunks(name: str) -> None:
    skip_if_the_host_fails("chunked prefill")
    model, _ = pruned(name)
    with pytest.raises(ValueError, match="this prompt comes in chunks"):
        steps(model, prompt(model, (2,)), prefill_chunk_size=7)


@every_pruner
def test_a_cache_that_does_not_grow_is_refused(name: str) -> None:
    model, _ = pruned(name)
    with pytest.raises(ValueError, match=r"a cache of StaticLayer cannot hold fewer tokens in later layers"):
        steps(model, prompt(model), cache_implementation="static")


@pytest.mark.parametrize("host", ["idefics3", "got_ocr2"])
def test_hosts_whose_tokens_cannot_be_followed_are_refused_untouched(host: str) -> None:
    """Their projector reads several rows for each token, or none at all in raster order."""
    model = build_host(host)
    parts = resolve(model)
    inputs = call_inputs(model, parts)
    expected, state = logits(model, inputs), Fingerprint(model)
    with pytest.raises(
        ValueError, match="in a way that a pruner of the encoder cannot follow; use a pruner of the dec"
    ):
        attach_pruner(model, "faster_vlm")
    state.check(model)
    assert torch.equal(logits(model, inputs), expected)
    handle = attach_pruner(model, "fastv", layer=1)
    assert not torch.equal(logits(model, inputs), expected)
    handle.detach()
