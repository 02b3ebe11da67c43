"""Pruners in every way of running a model, and what they refuse."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from tests import pruning_oracle as oracle
from tests import pruning_reference as reference
from tests.hosts import CACHE, DECODER_CONFIGS, IMAGE_TOKEN, batch, build_llava, skip_if_the_host_fails
from tests.pruning_hosts import HOSTS, build, logits, prompt, row_of
from tests.test_pruners_in_hosts import CLOSE, GREEDY, REFUSED, SMALL, STEPS
from vision_remember import PRUNERS, attach_pruner
from vision_remember.adapters.decoder_queries import READABLE
from vision_remember.adapters.pruned_cache import PrunedLayer, cache_of
from vision_remember.adapters.pruner import CUTTABLE
from vision_remember.pruning import DecoderPruner

every_pruner = pytest.mark.parametrize("name", PRUNERS)
READERS = ("fastv", "pyramid_drop", "sparse_vlm")
OF_THE_ENCODER = ("faster_vlm", "prumerge_plus", "tome", "vision_zip")


def pruned(name: str, host: str = "llava", decoder: str = "qwen2") -> tuple[Any, Any]:
    model = build(host, decoder)
    return model, attach_pruner(model, name, **SMALL[name])


def steps(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    """(B, steps, vocabulary), the logits of greedy decoding."""
    return torch.stack(model.generate(**inputs, **{**GREEDY, **options}).logits, 1)


@every_pruner
@pytest.mark.parametrize("host", HOSTS)
def test_the_first_step_of_generate_equals_a_forward(host: str, name: str) -> None:
    if (host, name) in REFUSED:
        pytest.skip("refused, as test_tome_needs_a_token_for_each_patch shows")
    model, _ = pruned(name, host)
    inputs = prompt(model)
    torch.testing.assert_close(steps(model, inputs)[:, 0], logits(model, inputs)[:, -1], **CLOSE)


@pytest.mark.parametrize("name", [*OF_THE_ENCODER, "uniform", "random"])
def test_without_a_cache_the_same_tokens_are_dropped(name: str) -> None:
    """Where the prompt does not decide. Where it does, the newest token asks anew in every step, as FastV published."""
    model, _ = pruned(name)
    inputs = prompt(model)
    torch.testing.assert_close(steps(model, inputs, use_cache=False), steps(model, inputs), **CLOSE)


@every_pruner
@pytest.mark.parametrize("beams", [1, 3])
def test_several_sequences_equal_those_of_each_row(beams: int, name: str) -> None:
    model, _ = pruned(name)
    counts = (1, 2, 0)
    inputs = prompt(model, counts)
    options = {**GREEDY, "num_return_sequences": 2, "num_beams": beams, "do_sample": beams == 1, "top_k": 1}
    together = model.generate(**inputs, **options).sequences[:, -STEPS:]
    rows = [model.generate(**row_of(model, inputs, counts, row), **options).sequences[:, -STEPS:] for row in range(3)]
    assert torch.equal(together, torch.cat(rows))


@pytest.mark.parametrize("name", OF_THE_ENCODER)
@pytest.mark.parametrize("way", [{"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_pruners_of_the_encoder_take_chunks_and_guesses(way: dict[str, Any], name: str) -> None:
    if "prefill_chunk_size" in way:
        skip_if_the_host_fails("chunked prefill")
    model, _ = pruned(name)
    inputs = prompt(model, (2,))
    options = {**GREEDY, "max_new_tokens": 8}
    wanted = model.generate(**inputs, **options).sequences
    assert torch.equal(model.generate(**inputs, **options, **way).sequences, wanted)


@every_pruner
def test_generating_from_embeddings_equals_generating_from_ids(name: str) -> None:
    model, _ = pruned(name)
    inputs = prompt(model)
    expected = steps(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(steps(model, {"inputs_embeds": embeds, **inputs}), expected, **CLOSE)


@every_pruner
@pytest.mark.parametrize("first", [(1, 1), (0, 1)], ids=["images in both turns", "a text-only row in the first turn"])
def test_a_second_turn_continues_a_pruned_cache(first: tuple[int, int], name: str) -> None:
    """The first turn's tokens stay dropped; the second brings text, then an image; the third a word."""
    model, _ = pruned(name)
    generator = torch.Generator().manual_seed(5)
    turn = prompt(model, first)
    words = torch.randint(2, 80, (2, 3), generator=generator)
    image = torch.full((2, 64), IMAGE_TOKEN)
    more = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    cache = hf.DynamicCache(config=model.config.text_config)
    mask = turn["attention_mask"]
    with torch.no_grad():
        model(**turn, **{CACHE: cache}, use_cache=True)
        found = []
        for ids, extra in ((words, {}), (torch.cat([image, words], 1), more), (words[:, :1], {})):
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            out = model(input_ids=ids, attention_mask=mask, **{CACHE: cache}, use_cache=True, **extra)
            found.append(out.logits)
        one = [
            _turns(model, row_of(model, turn, first, row), words[row : row + 1], more["pixel_values"][row : row + 1])
            for row in range(2)
        ]
    torch.testing.assert_close(torch.cat(found[1:], 1), torch.cat(one), **CLOSE)
    assert cache.get_seq_length() == mask.shape[1]


def _turns(model: Any, turn: dict[str, Any], words: Tensor, pixels: Tensor) -> Tensor:
    """The last two turns' logits of one row without padding."""
    cache = hf.DynamicCache()
    model(**turn, **{CACHE: cache}, use_cache=True)
    model(input_ids=words, **{CACHE: cache}, use_cache=True)
    ids = torch.cat([torch.full((1, 64), IMAGE_TOKEN), words], 1)
    image = model(input_ids=ids, pixel_values=pixels, **{CACHE: cache}, use_cache=True).logits
    return torch.cat([image, model(input_ids=words[:, :1], **{CACHE: cache}).logits], 1)


def test_a_second_image_is_pruned_by_attention_over_the_whole_cache() -> None:
    """FastV in a second turn, against one pass over both turns from which the same tokens are hidden."""
    model = build("llava")
    both = prompt(model, (2,))
    ids, images = both["input_ids"], both["pixel_values"]
    cut = int((ids[0] == IMAGE_TOKEN).nonzero()[64])  # the second image's first token
    turns = [
        {"input_ids": ids[:, :cut], "attention_mask": torch.ones_like(ids[:, :cut]), "pixel_values": images[:1]},
        both,
    ]
    kept: list[Tensor] = []

    def choose(stage: int, attention: Tensor, members: Tensor, initial: int) -> list[int]:
        new = members[members >= cut] if initial > 64 else members
        old = [place for place in kept[0][0].nonzero()[:, 0].tolist() if place < cut] if kept else []
        return old + reference.top(attention.mean(0)[-1], new, 26)

    first = oracle.survivors(model, turns[0], [(2, 1)], choose)
    kept.append(first[2])
    earlier = torch.cat([first[2], torch.ones_like(ids[:, cut:], dtype=torch.bool)], 1)
    # The first turn's tokens are gone in layer 2 already; layer 1, whose attention decides, still has them.
    alive = oracle.survivors(model, both, [(2, 1)], choose)
    assert not (alive[2] & ~earlier).any()
    wanted = oracle.run(model, both, alive).logits[:, cut:]
    attach_pruner(model, "fastv", layer=2, keep=0.4)
    cache = hf.DynamicCache()
    with torch.no_grad():
        model(**turns[0], **{CACHE: cache}, use_cache=True)
        found = model(input_ids=ids[:, cut:], pixel_values=images[1:], **{CACHE: cache}, use_cache=True).logits
    here = alive[2][:, cut:]
    torch.testing.assert_close(found[here], wanted[here], **CLOSE)


@every_pruner
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_one_length_may_lose_different_numbers_of_tokens(padded: bool, implementation: str, name: str) -> None:
    """A row with an image is filled up to the length of a text-only one with dropped tokens, which must not be seen."""
    model, _ = pruned(name)
    model.set_attn_implementation(implementation)
    inputs = prompt(model, (1,))
    long = torch.randint(2, 80, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(3))
    rows = [inputs["input_ids"], long]
    if padded:
        rows.append(torch.nn.functional.pad(long[:, :9], (long.shape[1] - 9, 0)))
    ids = torch.cat(rows)
    together = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": inputs["pixel_values"]}
    found = steps(model, together)
    torch.testing.assert_close(found[:1], steps(model, inputs), **CLOSE)
    alone = {"input_ids": long, "attention_mask": torch.ones_like(long)}
    torch.testing.assert_close(found[1:2], steps(model, alone), **CLOSE)


@every_pruner
def test_another_attention_function_gives_the_same(name: str) -> None:
    model, _ = pruned(name)
    inputs = prompt(model)
    expected = steps(model, inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(steps(model, inputs), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("decoder", [name for name in CUTTABLE if name in DECODER_CONFIGS])
def test_tokens_can_be_dropped_in_these_decoders(decoder: str) -> None:
    model = build("llava", decoder)
    inputs = prompt(model)

    def choose(stage: int, attention: Tensor, members: Tensor, initial: int) -> list[int]:
        return members[::2].tolist()

    alive = oracle.survivors(model, inputs, [(2, None)], choose)
    _, wanted = oracle.continued(model, inputs, alive, STEPS)
    attach_pruner(model, "uniform", layer=2)
    torch.testing.assert_close(steps(model, inputs), wanted, **CLOSE)


@pytest.mark.parametrize("decoder", [name for name in READABLE if name in DECODER_CONFIGS])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_attention_is_read_as_the_decoder_computes_it(decoder: str, kind: str) -> None:
    model = build("llava", decoder).to(getattr(torch, kind))
    inputs = prompt(model)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    seen: list[Tensor] = []

    class Listener(DecoderPruner):
        source = "test"
        inner = PRUNERS["fastv"]()

        def stages(self, depth: int) -> Any:
            return self.inner.stages(depth)

        def choose(self, stage: int, tokens: Any) -> Any:
            seen.append(tokens.attention)
            return self.inner.choose(stage, tokens)

    model.set_attn_implementation("eager")
    wanted = oracle.run(model, inputs, {}, output_attentions=True).attentions[1][:, :, -1:]
    model.set_attn_implementation("sdpa")
    attach_pruner(model, "fastv")
    model.model.__dict__["_vision_pruner"].pruner = Listener()
    logits(model, inputs)
    close = {"atol": 1e-5, "rtol": 1e-4} if kind == "float32" else {"atol": 0.02, "rtol": 0.1}
    torch.testing.assert_close(seen[0].float(), wanted.float(), **close)


@every_pruner
def test_copies_and_pickles_prune_alike(name: str) -> None:
    model, handle = pruned(name)
    inputs = prompt(model)
    twin = copy.deepcopy(model)
    expected = logits(model, inputs)
    handle.detach()
    plain = logits(model, inputs)
    assert torch.equal(logits(twin, inputs), expected)
    assert not torch.equal(plain, expected)
    if name in ("fastv", "vision_zip"):
        fresh, _ = pruned(name)  # transformers' own hooks, put in place by a first pass, cannot be pickled
        assert torch.equal(logits(pickle.loads(pickle.dumps(fresh)), inputs), expected)


@every_pruner
def test_threads_do_not_see_each_other(name: str) -> None:
    model, _ = pruned(name)
    calls = [prompt(model, counts, seed=seed) for seed, counts in enumerate([(1, 2, 0), (1,), (2, 1)])]
    expected = [logits(model, inputs) for inputs in calls]
    found: dict[tuple[int, int], Tensor] = {}

    def work(number: int) -> None:
        for turn in range(3):
            found[number, turn] = logits(model, calls[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(torch.equal(value, expected[number]) for (number, _), value in found.items())


@every_pruner
def test_an_exception_leaves_nothing_behind(name: str) -> None:
    model, _ = pruned(name)
    inputs = prompt(model)
    expected = logits(model, inputs)

    def fail(*_: Any) -> None:
        raise OSError("in the middle")

    for module in (model.model.language_model.layers[3].mlp, model.model.vision_tower.encoder.layers[3].mlp):
        handle = module.register_forward_hook(fail)
        with pytest.raises(OSError, match="in the middle"):
            logits(model, prompt(model, (2,), seed=3))
        handle.remove()
    assert torch.equal(logits(model, inputs), expected)


@every_pruner
def test_a_pruned_cache_stays_usable_when_the_pruner_is_switched_off(name: str) -> None:
    model, handle = pruned(name)
    inputs = prompt(model)
    ids = torch.tensor([[7], [8], [9]])
    caches = [hf.DynamicCache(), hf.DynamicCache()]
    with torch.no_grad():
        for cache in caches:
            model(**inputs, **{CACHE: cache}, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
        expected = model(input_ids=ids, attention_mask=mask, **{CACHE: caches[0]}).logits
        with handle.disabled():
            found = model(input_ids=ids, attention_mask=mask, **{CACHE: caches[1]}).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", OF_THE_ENCODER)
def test_images_encoded_ahead_are_pruned_too(name: str) -> None:
    model, _ = pruned(name)
    inputs = prompt(model, (1, 1))
    expected = logits(model, inputs)
    ahead = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    assert torch.equal(logits(model, inputs, mm_encoder_outputs={"image": ahead}), expected)
    plain = build("llava")
    before = plain.model.get_image_features(torch.randn(2, 3, 32, 32), return_dict=True)
    with pytest.raises(ValueError, match="encoded without the pruner"):
        logits(model, inputs, mm_encoder_outputs={"image": before})


@pytest.mark.parametrize("name", ["faster_vlm", "vision_zip", "tome"])
def test_encoders_without_a_cls_token_are_read_by_the_attention_of_all(name: str) -> None:
    model = build_llava("qwen2", "siglip")
    inputs = batch(model, (1, 2, 0))
    before = logits(model, inputs)
    handle = attach_pruner(model, name, **SMALL[name])
    found = logits(model, inputs)
    assert found.isfinite().all()
    assert not torch.allclose(found[:2, -1], before[:2, -1], atol=1e-2)
    torch.testing.assert_close(found[2, -1], before[2, -1], **CLOSE)
    assert handle.tokens_per_layer is not None
    assert handle.tokens_per_layer[0, 1] == 2 * handle.tokens_per_layer[0, 0]


def test_the_attention_of_all_is_the_mean_of_the_rows() -> None:
    from vision_remember.adapters.encoder_attention import patch_attention
    from vision_remember.adapters.encoders import encoder_spec

    model = build_llava("qwen2", "siglip")
    tower = model.model.vision_tower
    block = tower.encoder.layers[2]
    hidden = torch.randn(2, 49, 32)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        _, weights = block.self_attn(block.layer_norm1(hidden), None)
    found, _ = patch_attention(block, encoder_spec(tower), hidden, heads=True)
    torch.testing.assert_close(found, weights.mean((1, 2)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_layer_may_be_handed_its_cache_by_the_new_name_or_the_old_one(name: str) -> None:
    cache = hf.DynamicCache()
    assert cache_of({"use_cache": True, name: cache}) is cache
    assert cache_of({"use_cache": True, name: None}) is cache_of({}) is None


def test_a_pruned_layer_follows_the_operations_of_its_cache() -> None:
    model, _ = pruned("fastv")
    cache = hf.DynamicCache()
    inputs = prompt(model)
    with torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
        length, late = inputs["input_ids"].shape[1], cache.layers[2]
        assert isinstance(late, PrunedLayer)
        assert type(cache.layers[1]) is not PrunedLayer
        columns, held = late.places().clone(), late.holding()
        assert held is not None
        cache.batch_repeat_interleave(2)
        assert torch.equal(late.places(), columns.repeat_interleave(2, 0))
        cache.reorder_cache(torch.tensor([0, 2, 4]))
        assert torch.equal(late.places(), columns)
        assert torch.equal(late.holding(), held)
        cache.batch_select_indices(torch.tensor([1, 0]))
        assert torch.equal(late.places(), columns[[1, 0]])
        assert len(late.keys) == 2
        assert late.get_seq_length() == length
        cache.reset()
        assert late.get_seq_length() == 0


@pytest.mark.parametrize("counts", [(2, 1), (0, 0), (1,)], ids=str)
def test_a_cache_that_was_reset_serves_a_batch_of_any_size(counts: tuple[int, ...]) -> None:
    model, _ = pruned("fastv")
    cache, inputs = hf.DynamicCache(), prompt(model, counts, seed=4)
    with torch.no_grad():
        model(**prompt(model, (1, 2, 0)), **{CACHE: cache}, use_cache=True)
        cache.reset()
        found = model(**inputs, **{CACHE: cache}, use_cache=True).logits
        more = torch.full((len(counts), 1), 7)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        found = torch.cat([found, model(input_ids=more, attention_mask=mask, **{CACHE: cache}).logits], 1)
        fresh = hf.DynamicCache()
        wanted = model(**inputs, **{CACHE: fresh}, use_cache=True).logits
        wanted = torch.cat([wanted, model(input_ids=more, attention_mask=mask, **{CACHE: fresh}).logits], 1)
    assert torch.equal(found, wanted)
