"""What the published implementations get wrong, by method; each as a fact about ours."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tests.fingerprint import structure
from tests.hosts import CACHE, IMAGE_TOKEN
from tests.pruning_hosts import build, logits, prompt, row_of
from tests.test_pruners_at_work import every_pruner, pruned, steps
from tests.test_pruners_in_hosts import CLOSE, SMALL
from vision_remember import PRUNERS, attach_pruner
from vision_remember.adapters.shortening import Cut

ROOT = Path(__file__).resolve().parents[1]
FLASH = "flash_by_hand"
Kept = dict[int, Tensor]


@contextmanager
def watched(model: Any) -> Iterator[dict[int, dict[str, Any]]]:
    """Inside the ``with``, what each decoder layer was given last, by its number."""
    seen: dict[int, dict[str, Any]] = {}

    def keep(index: int) -> Any:
        return lambda layer, args, kwargs, output: seen.update({index: {**kwargs, "hidden": args[0]}})

    layers = model.model.language_model.layers
    handles = [layer.register_forward_hook(keep(index), with_kwargs=True) for index, layer in enumerate(layers)]
    yield seen
    for handle in handles:
        handle.remove()


def cached(model: Any, inputs: dict[str, Any]) -> hf.DynamicCache:
    cache = hf.DynamicCache()
    with torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
    return cache


# FastV


def test_fastv_chooses_for_each_row_by_its_own_attention() -> None:
    """Published: the first row's choice is applied to all."""
    model, _ = pruned("fastv")
    inputs = prompt(model, (1, 1))
    with watched(model) as seen:
        logits(model, inputs)
    first, second = seen[3]["position_ids"]
    assert first.tolist() != second.tolist()


def test_fastv_keeps_padding_out() -> None:
    """Published: the mask is made anew without it. Here the same row, with more padding, gives the same."""
    model, _ = pruned("fastv")
    inputs = prompt(model, (1,))
    padded = {
        **inputs,
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (9, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (9, 0)),
    }
    torch.testing.assert_close(steps(model, padded), steps(model, inputs), **CLOSE)


def test_fastv_stores_keys_once_and_only_what_is_left() -> None:
    """Published: the layer that is looked at runs twice into the same cache, or later layers share one layer's keys."""
    model, _ = pruned("fastv")
    inputs = prompt(model, (1,))
    length = inputs["input_ids"].shape[1]
    cache = cached(model, inputs)
    assert [layer.keys.shape[2] for layer in cache.layers] == [length, length, length - 32, length - 32]
    assert not torch.equal(cache.layers[2].keys, cache.layers[3].keys)
    with torch.no_grad():
        model(input_ids=torch.tensor([[7]]), **{CACHE: cache})
    assert [layer.keys.shape[2] for layer in cache.layers] == [length + 1, length + 1, length - 31, length - 31]
    assert cache.get_seq_length() == length + 1


def test_fastv_finds_images_wherever_they_stand() -> None:
    """Published: one span from position 35 to 611."""
    model, _ = pruned("fastv")
    inputs = prompt(model, (2, 0, 1))
    with watched(model) as seen:
        logits(model, inputs)
    cut = seen[3]["vision_pruning"].cut
    ids = inputs["input_ids"].gather(1, cut.columns)
    left = (ids == IMAGE_TOKEN) & cut.held
    assert left.sum(1).tolist() == [64, 0, 32]
    text = (inputs["input_ids"] != IMAGE_TOKEN) & inputs["attention_mask"].bool()
    assert ((ids != IMAGE_TOKEN) & cut.held).sum(1).tolist() == text.sum(1).tolist()


# All that work in the decoder: eager attention is not needed


@every_pruner
def test_no_attention_map_is_made(name: str) -> None:
    """Published: eager attention in a layer at least, of the decoder or of CLIP."""
    model, _ = pruned(name)
    inputs = prompt(model)
    assert model.config._attn_implementation == "sdpa"
    seen: list[Any] = []
    modules = [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]
    for layer in modules:
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    logits(model, inputs)
    assert len(seen) == len(modules)
    assert all(weights is None for weights in seen)


def flash_by_hand(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What flash attention does with padding: rows without it, causal from the bottom right, gaps mean packing."""
    positions, length = options.get("position_ids"), query.shape[2]
    assert positions is None or not _is_packed_sequence(positions, len(query))
    groups = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for row in range(len(query)):
        asked = torch.ones(key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
        asking = asked[-length:]
        keys, values = (x[row][:, asked].repeat_interleave(groups, 0) for x in (key, value))
        queries = query[row][:, asking]
        causal = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - queries.shape[1])
        scores = (queries @ keys.transpose(1, 2) * options["scaling"]).masked_fill(~causal, -torch.inf)
        out[row][:, asking] = scores.softmax(-1) @ values
    return out.transpose(1, 2), None


@pytest.fixture
def flash() -> Iterator[str]:
    AttentionInterface.register(FLASH, flash_by_hand)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    yield FLASH
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        table._global_mapping.pop(FLASH, None)


@every_pruner
@pytest.mark.parametrize("counts", [(1,), (1, 2, 0)], ids=["one row", "padded"])
def test_flash_attention_gets_masks_that_it_knows(counts: tuple[int, ...], name: str, flash: str) -> None:
    model, _ = pruned(name)
    inputs = prompt(model, counts)
    expected = steps(model, inputs)
    model.model.language_model.config._attn_implementation_internal = flash
    torch.testing.assert_close(steps(model, inputs), expected, **CLOSE)


# PyramidDrop


@every_pruner
def test_positions_are_kept(name: str) -> None:
    """Published (PyramidDrop, SparseVLM): positions are counted anew after each drop."""
    model, _ = pruned(name)
    inputs = prompt(model, (1,))
    length = inputs["input_ids"].shape[1]
    with watched(model) as seen:
        logits(model, inputs)
    positions = seen[3]["position_ids"][0]
    assert len(positions) < length
    assert (positions.diff() > 0).all()
    text = (inputs["input_ids"][0] != IMAGE_TOKEN).nonzero()[:, 0]
    assert set(text.tolist()) <= set(positions.tolist())
    cos, _ = model.model.language_model.rotary_emb(torch.zeros(1), positions[None])
    assert torch.equal(seen[3]["position_embeddings"][0], cos)


def test_pyramid_drop_counts_the_images_of_each_sample() -> None:
    """Published: numbers of images are looked up by the number of the sample."""
    model, handle = pruned("pyramid_drop")
    counts = (2, 0, 1, 2)
    inputs = prompt(model, counts)
    logits(model, inputs)
    assert handle.tokens_per_layer is not None
    assert handle.tokens_per_layer[1].tolist() == [64, 0, 32, 64]
    for row in range(len(counts)):
        alone = logits(model, row_of(model, inputs, counts, row))[0, -1]
        torch.testing.assert_close(logits(model, inputs)[row, -1], alone, **CLOSE)


def test_queries_may_share_keys() -> None:
    """Published (PyramidDrop): fewer heads for keys than for queries fail. All test models have two for four."""
    config = build("llava").config.text_config
    assert config.num_key_value_heads < config.num_attention_heads


# SparseVLM


@every_pruner
def test_nothing_depends_on_chance(name: str) -> None:
    """Published (SparseVLM): noise on the distances between tokens."""
    model, _ = pruned(name)
    inputs = prompt(model)
    torch.manual_seed(1)
    first = logits(model, inputs)
    torch.manual_seed(2)
    assert torch.equal(logits(model, inputs), first)
    state = torch.get_rng_state()
    logits(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_sparse_vlm_adapts_to_the_prompt() -> None:
    """Published: numbers from a table, chosen by an environment variable."""
    model, handle = pruned("sparse_vlm")
    found = set()
    for seed in range(4):
        logits(model, prompt(model, (1,), seed=seed))
        assert handle.tokens_per_layer is not None
        found.add(int(handle.tokens_per_layer[-1, 0]))
    assert len(found) > 1


# VisionZip, FasterVLM


@every_pruner
def test_other_models_are_left_alone(name: str) -> None:
    """Published (VisionZip): classes are changed, and with them every model of the process, for good."""
    other = build("llava")
    inputs, before = prompt(other), structure(other)
    expected = logits(other, inputs)
    model = build("llava")
    classes = [type(module) for module in model.modules()]
    own = {cls: _members(cls) for cls in classes}
    handle = attach_pruner(model, name, **SMALL[name])
    assert [type(module) for module in model.modules()] == classes
    logits(model, inputs)
    assert torch.equal(logits(other, inputs), expected)
    handle.detach()
    assert structure(other)["attributes"] == before["attributes"]
    assert {cls: _members(cls) for cls in classes} == own


def _members(cls: type) -> dict[str, Any]:
    """A class's own members; methods without wrappers that wait for models which are attached elsewhere."""
    return {name: inspect.unwrap(value) if callable(value) else value for name, value in vars(cls).items()}


@pytest.mark.parametrize("name", ["faster_vlm", "vision_zip", "prumerge", "prumerge_plus", "tome"])
def test_newlines_of_tiles_stay(name: str) -> None:
    """Published (VisionZip): tiles lose their newlines and are taken to be 24x24."""
    model, _ = pruned(name, "llava_next")
    inputs = prompt(model, (2,))
    newline = model.model.image_newline
    with torch.no_grad():
        newline.fill_(7.0)
    with watched(model) as seen:
        logits(model, inputs)
    whole = build("llava_next")
    with torch.no_grad():
        whole.model.image_newline.fill_(7.0)
    with watched(whole) as all_seen:
        logits(whole, inputs)
    count = int((all_seen[0]["hidden"] == 7.0).all(-1).sum())
    assert count > 0
    assert seen[0]["hidden"].shape[1] < all_seen[0]["hidden"].shape[1]
    cut = seen[0]["vision_pruning"].cut
    assert int((cut.take(all_seen[0]["hidden"]) == 7.0).all(-1).sum()) == count


def test_faster_vlm_takes_as_many_tokens_of_each_tile() -> None:
    model, handle = pruned("faster_vlm")
    logits(model, prompt(model, (1, 2)))
    assert handle.tokens_per_layer is not None
    assert handle.tokens_per_layer[0].tolist() == [19, 38]


# PruMerge


def test_prumerge_leaves_tokens_in_the_order_of_the_image() -> None:
    """Published: the order of their scores."""
    columns = []
    for name in ("prumerge", "prumerge_plus"):
        model, _ = pruned(name)
        with watched(model) as seen:
            logits(model, prompt(model, (1, 1)))
        columns.append(seen[0]["vision_pruning"].cut.columns)
    for found in columns:
        assert (found.diff(dim=1) > 0).all()


def test_prumerge_adapts_to_each_tile_of_a_batch() -> None:
    """Published: one sample at a time, and one number for all tiles of it."""
    model, handle = pruned("prumerge")
    counts = (1, 1, 1, 1, 1, 1)
    inputs = prompt(model, counts)
    logits(model, inputs)
    together = handle.tokens_per_layer
    assert together is not None
    assert len(set(together[0].tolist())) > 1
    for row in range(len(counts)):
        logits(model, row_of(model, inputs, counts, row))
        assert handle.tokens_per_layer is not None
        assert handle.tokens_per_layer[0, 0] == together[0, row]


def test_a_cut_puts_back_what_it_took() -> None:
    cut = Cut(torch.tensor([[0, 2, 3], [1, 2, 4]]), torch.tensor([[True, True, True], [True, False, True]]), 5)
    values = torch.randn(2, 5, 3)
    taken = cut.take(values)
    assert torch.equal(taken[1], values[1, [1, 2, 4]])
    put = cut.put(taken + 1, values)
    assert torch.equal(put[0, [1, 4]], values[0, [1, 4]])
    assert torch.equal(put[1, [0, 2, 3]], values[1, [0, 2, 3]])
    assert torch.equal(put[1, [1, 4]], values[1, [1, 4]] + 1)


def test_nothing_is_kept_in_globals() -> None:
    """Published (PruMerge): a dictionary of the module holds the hooks' results."""
    files = [*(ROOT / "vision_remember" / "pruning").glob("*.py"), *(ROOT / "adapters").glob("*prun*.py")]
    assert len(files) > len(PRUNERS)
    for path in files:
        for node in ast.parse(path.read_text()).body:
            made = isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, (ast.List, ast.Set))
            assert not made or "__all__" in ast.unparse(node), f"{path.name}: {ast.unparse(node)}"
