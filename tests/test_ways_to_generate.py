"""Ways to run a host, over the hosts that people use: with Vision Remember each gives what it gives without.

Each way is first tried on the host alone. Where that is wrong already, the host stands in ``WRONG_ALONE``.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from packaging.version import Version
from torch import Tensor

from tests.hosts import CACHE
from tests.zoo import extended
from tests.zoo_checks import NOISE, Subject, subject

HOSTS = (
    *("llava", "vipllava", "video_llava", "llava_next", "llava_next_video", "llava_onevision", "internvl"),
    *("idefics3", "smolvlm", "paligemma", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "aya_vision"),
    *("cohere2_vision", "lfm2_vl", "granite4_vision"),
)
NEW = 4
TEXT = torch.tensor([[11, 12, 13]])

Pair = tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=1)
def host_of(model_type: str) -> Subject:
    return subject(model_type)


def generate(host: Subject, **options: Any) -> Any:
    common = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [host.parts.image_token_id]}
    common |= {"eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    return host.model.generate(**{**host.inputs, **common, **options})


def full(host: Subject, ids: Tensor) -> Tensor:
    """(1, S, V), the logits of one whole forward pass without a cache."""
    return host.logits(**extended(host.model, host.inputs, ids), use_cache=False)


def same_sequence(**options: Any) -> Callable[[Subject], Pair]:
    """Greedy decoding in another way decodes the same."""

    def way(host: Subject) -> Pair:
        return generate(host, **options).sequences, generate(host).sequences

    return way


def assisted(host: Subject) -> Pair:
    """A copy of the model, with its blocks, guesses ahead."""
    return generate(host, assistant_model=copy.deepcopy(host.model)).sequences, generate(host).sequences


def sampled(host: Subject) -> Pair:
    """Each of several returns has the logits of its own whole forward pass."""
    torch.manual_seed(0)
    made = generate(host, do_sample=True, num_return_sequences=2)
    expected = torch.cat([full(host, row[None, :-1])[:, -1] for row in made.sequences])
    return made.logits[-1], expected


def beams(host: Subject) -> Pair:
    """The scores of beams are the mean log-likelihoods that whole forward passes give their tokens."""
    made = generate(host, num_beams=3, num_return_sequences=2, output_scores=True)
    start = host.inputs["input_ids"].shape[1]
    scores = []
    for row in made.sequences:
        logits = full(host, row[None])[0, start - 1 : -1].log_softmax(-1)
        scores.append(logits.gather(1, row[start:, None]).mean())
    return made.sequences_scores, torch.stack(scores)


def another_turn(host: Subject) -> Pair:
    """More text on top of a cache that holds the images."""
    with torch.no_grad():
        first = host.model(**host.inputs, use_cache=True)
        mask = torch.ones(1, host.inputs["input_ids"].shape[1] + TEXT.shape[1], dtype=torch.long)
        second = host.model(input_ids=TEXT, **{CACHE: first[CACHE]}, attention_mask=mask)
    return second.logits[0, -1], full(host, torch.cat([host.inputs["input_ids"], TEXT], 1))[0, -1]


def embeddings(host: Subject) -> Pair:
    """Embeddings in place of token ids."""
    embeds = host.model.get_input_embeddings()(host.inputs["input_ids"]).detach()
    return host.logits(input_ids=None, inputs_embeds=embeds), host.logits()


def with_a_row_of_text(host: Subject) -> Pair:
    """A batch with a text-only row, padded on the left, is the prompt and the text one by one."""
    length = host.inputs["input_ids"].shape[1]
    pads = torch.zeros(1, length - TEXT.shape[1], dtype=torch.long)
    changed = {"input_ids": torch.cat([host.inputs["input_ids"], torch.cat([pads, TEXT], 1)])}
    changed["attention_mask"] = torch.cat([torch.ones(1, length), torch.cat([pads, torch.ones_like(TEXT)], 1)]).long()
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in host.inputs:
            changed[name] = torch.cat([host.inputs[name], torch.zeros_like(host.inputs[name])])
    both = host.logits(**changed)
    with torch.no_grad():
        alone = host.model(input_ids=TEXT).logits
    return torch.cat([both[0], both[1, -TEXT.shape[1] :]]), torch.cat([host.logits()[0], alone[0]])


WAYS: dict[str, Callable[[Subject], Pair]] = {
    "static cache": same_sequence(cache_implementation="static"),
    "no cache": same_sequence(use_cache=False),
    "chunked prefill": same_sequence(prefill_chunk_size=7),
    "prompt lookup": same_sequence(prompt_lookup_num_tokens=2),
    "assisted": assisted,
    "sampling, several returns": sampled,
    "beams": beams,
    "another turn": another_turn,
    "embeddings": embeddings,
    "a row of text": with_a_row_of_text,
}

_M_ROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_NO_POOLED_TOKENS = ("granite4_vision",)
# Granite 4 keeps its tokens where generate() neither repeats nor cuts them. The positions of Qwen's need the token ids
# of the whole sequence, which neither embeddings nor the tokens of one more turn tell.
LISTED_FOR = "5.23"
WRONG_ALONE: dict[str, tuple[str, ...]] = {
    "chunked prefill": _NO_POOLED_TOKENS,
    "sampling, several returns": _NO_POOLED_TOKENS,
    "beams": _NO_POOLED_TOKENS,
    "another turn": (*_M_ROPE, *_NO_POOLED_TOKENS),
    "embeddings": _M_ROPE,
}


def holds(way: Callable[[Subject], Pair], host: Subject) -> bool:
    try:
        made, expected = way(host)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, KeyError):
        return False
    return made.shape == expected.shape and torch.allclose(made, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", HOSTS)
def test_a_way_to_run(model_type: str, way: str) -> None:
    host = host_of(model_type)
    alone = holds(WAYS[way], host)
    if Version(hf.__version__) < Version(LISTED_FOR):
        if not alone:
            pytest.skip(f"{way} of {model_type} alone is wrong in transformers {hf.__version__}")
    elif model_type in WRONG_ALONE.get(way, ()):
        assert not alone, "the host alone is right by now: take it from WRONG_ALONE"
        return
    assert alone, "the host alone"
    handle = host.attach()
    try:
        made, expected = WAYS[way](host)
    finally:
        handle.detach()
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl"])  # qwen3_vl reads deepstack features of its own
def test_images_that_were_encoded_with_memory_serve_the_disabled_model(model_type: str) -> None:
    host = host_of(model_type)
    handle = host.attach()
    taken = inspect.signature(host.parts.base.get_image_features).parameters
    with torch.no_grad():
        given = {name: value for name, value in host.inputs.items() if name in taken}
        encoded = host.parts.base.get_image_features(**given, return_dict=True)
        with handle.disabled():
            assert torch.equal(host.logits(pixel_values=None, mm_encoder_outputs={"image": encoded}), host.alone)
    handle.detach()


@pytest.mark.parametrize("model_type", HOSTS)
def test_a_prompt_without_an_image_is_the_hosts_own(model_type: str) -> None:
    host = host_of(model_type)
    with torch.no_grad():
        expected = host.model(input_ids=TEXT).logits
        handle = host.attach()
        assert torch.equal(host.model(input_ids=TEXT).logits, expected)
        assert (host.logits() - host.alone).abs().max() > NOISE
        handle.detach()
