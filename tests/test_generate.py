"""Invariant 2: every way to generate gives the tokens that full forwards give, where the host itself does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode

from tests.hosts import (
    CACHE,
    IMAGE_TOKEN,
    PAD_TOKEN,
    PAIRINGS,
    batch,
    build_llava,
    randomise,
    skip_if_the_host_fails,
)
from vision_remember import attach_vision_remember, compress_projector

STEPS = 6
COMMON = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}

WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def build(decoder: str, encoder: str, attached: bool) -> Any:
    model = build_llava(decoder, encoder)
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    if attached:
        randomise(attach_vision_remember(model, [1, 3]))
    return model


def greedy(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Greedy decoding by full forwards from raw pixels: no cache, nothing encoded ahead."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(STEPS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, position_ids=positions).logits[:, -1]
        logits[:, IMAGE_TOKEN] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


@pytest.mark.parametrize("attached", [False, True], ids=["host alone", "attached"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("decoder", "encoder"), PAIRINGS)
def test_generate_equals_full_forwards(decoder: str, encoder: str, way: str, attached: bool) -> None:
    skip_if_the_host_fails(way)
    model = build(decoder, encoder, attached)
    # Prompt lookup takes one sequence at a time.
    inputs = batch(model, (2,) if way == "prompt lookup" else (1, 2, 0))
    assert torch.equal(model.generate(**inputs, **COMMON, **WAYS[way]), greedy(model, inputs))


@pytest.mark.parametrize("attached", [False, True], ids=["host alone", "attached"])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("beams", [1, 3])
def test_several_sequences_equal_the_repeated_batch(beams: int, chunk: int | None, attached: bool) -> None:
    """Samples are drawn under a seed that both runs share; beams need no draw."""
    if chunk is not None:
        skip_if_the_host_fails("chunked prefill")
    model = build("qwen2", "clip", attached)
    inputs = batch(model, (1, 2, 0))
    options = {**COMMON, "do_sample": beams == 1, "prefill_chunk_size": chunk}
    torch.manual_seed(0)
    together = model.generate(**inputs, **options, num_beams=beams, num_return_sequences=3)
    if beams > 1:
        options |= {"num_beams": beams, "num_return_sequences": 3}
        rows = [model.generate(**one, **options) for one in singles(inputs, (1, 2, 0))]
        width = min(row.shape[1] for row in rows)
        assert torch.equal(together[:, -STEPS:], torch.cat([row[:, -STEPS:] for row in rows]))
        assert width >= STEPS
    else:
        images = inputs["pixel_values"]
        repeated = {
            "input_ids": inputs["input_ids"].repeat_interleave(3, 0),
            "attention_mask": inputs["attention_mask"].repeat_interleave(3, 0),
            "pixel_values": torch.cat([*[images[:1]] * 3, *[images[1:]] * 3]),
        }
        torch.manual_seed(0)
        assert torch.equal(together, model.generate(**repeated, **options))


def singles(inputs: dict[str, torch.Tensor], counts: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """The rows of a batch, unpadded, each with its own images."""
    images = iter(inputs["pixel_values"].split([c for c in counts if c]))
    rows = []
    for ids, count in zip(inputs["input_ids"], counts, strict=True):
        kept = ids[ids != PAD_TOKEN][None]
        row = {"input_ids": kept, "attention_mask": torch.ones_like(kept)}
        rows.append({**row, "pixel_values": next(images)} if count else row)
    return rows


@pytest.mark.parametrize("assistant", ["text", "attached llava"])
def test_assisted_decoding_equals_greedy(assistant: str) -> None:
    model = build("qwen2", "clip", attached=True)
    inputs = batch(model, (2,))
    if assistant == "text":
        torch.manual_seed(3)
        helper: Any = hf.Qwen2ForCausalLM(model.config.text_config).eval()
    else:
        helper = build("qwen2", "clip", attached=True)
    assert torch.equal(model.generate(**inputs, **COMMON, assistant_model=helper), greedy(model, inputs))


def test_generate_from_embeddings_equals_generate_from_ids() -> None:
    model = build("qwen2", "clip", attached=True)
    inputs = batch(model, (1, 2, 0))
    expected = model.generate(**inputs, **COMMON)[:, -STEPS:]
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, **COMMON)[:, -STEPS:], expected)


def test_a_second_turn_may_bring_only_its_new_image() -> None:
    model = build("qwen2", "clip", attached=True)
    both = batch(model, (2,))
    ids, images = both["input_ids"], both["pixel_values"]
    second = int((ids[0] == IMAGE_TOKEN).nonzero()[16])  # the second image's first token
    cache = hf.DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(input_ids=ids[:, :second], pixel_values=images[:1], **{CACHE: cache}, use_cache=True)
        rest = model(input_ids=ids[:, second:], pixel_values=images[1:], **{CACHE: cache}, use_cache=True).logits
        whole = model(**both).logits[:, second:]
    torch.testing.assert_close(rest, whole, atol=1e-4, rtol=1e-4)


def test_decode_steps_run_no_block() -> None:
    model = build("qwen2", "clip", attached=True)
    calls: list[int] = []
    block = model.model.language_model.layers[1].vision_remember
    block.register_forward_hook(lambda *_: calls.append(1))
    cached = model.generate(**batch(model), **COMMON, return_dict_in_generate=True)[CACHE]
    assert len(calls) == 1
    plain = build("qwen2", "clip", attached=False)
    expected = plain.generate(**batch(plain), **COMMON, return_dict_in_generate=True)[CACHE]
    assert [layer.keys.shape for layer in cached.layers] == [layer.keys.shape for layer in expected.layers]


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_a_decode_step_runs_no_operation_more() -> None:
    made = {}
    for attached in (False, True):
        model = build("qwen2", "clip", attached=attached)
        with torch.no_grad():
            with Operations() as prefill:
                cache = model(**batch(model), use_cache=True)[CACHE]
            with Operations() as step:
                model(input_ids=torch.tensor([[7]] * len(cache.layers[0].keys)), **{CACHE: cache}, use_cache=True)
        made[attached] = prefill.names, step.names
    assert len(made[True][0]) > len(made[False][0])
    assert made[True][1] == made[False][1]


def test_images_encoded_ahead_give_the_same_logits() -> None:
    model = build("qwen2", "clip", attached=True)
    inputs = batch(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        ahead = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        model.model.get_image_features(torch.randn(2, 3, 32, 32))  # another call in between changes nothing
        assert torch.equal(model(**inputs, mm_encoder_outputs={"image": ahead}).logits, expected)


def test_images_encoded_before_attaching_are_refused() -> None:
    model = build("qwen2", "clip", attached=False)
    inputs = batch(model)
    ahead = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    attach_vision_remember(model, [1])
    with pytest.raises(ValueError, match="encoded without Vision Remember"):
        model(**inputs, mm_encoder_outputs={"image": ahead})
