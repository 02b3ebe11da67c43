"""Attention density: the formula on hand-made maps, and the rows that are recomputed against eager attention."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.fingerprint import Fingerprint
from tests.hosts import DECODER_CONFIGS, IMAGE_TOKEN, batch, build_llava, randomise
from vision_remember import attach_pruner, attach_vision_remember, attention_density
from vision_remember.adapters.attention_rows import attention_rows, eager_function
from vision_remember.analysis import density, token_groups

CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()[None]
GROUP = torch.tensor([[False, True, True, False, False, True]])


def uniform(visible: torch.Tensor, heads: int = 2) -> torch.Tensor:
    weights = visible / visible.sum(-1, keepdim=True)
    return weights[:, None].expand(-1, heads, -1, -1).float()


@pytest.mark.parametrize("window", [6, 3])
def test_uniform_attention_has_density_one_wherever_the_query_stands(window: int) -> None:
    visible = CAUSAL & ~CAUSAL.tril(-window)
    for row in range(1, 6):
        one = slice(row, row + 1)
        found = density(uniform(visible)[:, :, one], GROUP, visible[:, one])
        torch.testing.assert_close(found, torch.ones(1, 2), rtol=1e-6, atol=0)


def test_without_the_correction_an_early_query_is_measured_against_the_whole_sequence() -> None:
    row = slice(3, 4)  # sees 4 of 6 positions, 2 of the 3 in the group
    found = density(uniform(CAUSAL)[:, :, row], GROUP, CAUSAL[:, row], causal_correction=False)
    torch.testing.assert_close(found, torch.full((1, 2), (2 / 4) / (3 / 6)))
    row = slice(2, 3)
    found = density(uniform(CAUSAL)[:, :, row], GROUP, CAUSAL[:, row], causal_correction=False)
    torch.testing.assert_close(found, torch.full((1, 2), (2 / 3) / (3 / 6)))


def test_padding_is_no_part_of_the_sequence() -> None:
    tokens = torch.tensor([[False, True, True, True, True, True]])
    visible = CAUSAL & tokens[:, None]
    for corrected in (True, False):
        found = density(uniform(visible)[:, :, 5:], GROUP, visible[:, 5:], tokens=tokens, causal_correction=corrected)
        torch.testing.assert_close(found, torch.ones(1, 2))


def test_a_known_map_has_its_density_in_each_head() -> None:
    weights = torch.tensor([[0, 0.5, 0.2, 0.2, 0.1, 0], [0.5, 0, 0, 0.5, 0, 0], [0, 0.5, 0.5, 0, 0, 0.0]])
    found = density(weights[None, :, None], GROUP, CAUSAL[:, 5:])
    torch.testing.assert_close(found, torch.tensor([[1.4, 0.0, 2.0]]))


def test_queries_are_averaged_and_those_that_see_nothing_of_the_group_left_out() -> None:
    weights = torch.zeros(1, 1, 6, 6)
    weights[..., 0] = 1.0
    weights[0, 0, 2] = torch.tensor([0, 1.0, 0, 0, 0, 0])  # density 1 / (2/3)
    found = density(weights, GROUP, CAUSAL, queries=torch.tensor([[True, False, True, True, False, False]]))
    torch.testing.assert_close(found, torch.tensor([[(1.5 + 0.0) / 2]]))
    assert density(weights, GROUP, CAUSAL, queries=torch.tensor([[True] + [False] * 5])).isnan().all()


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"group \(1, 5\)"):
        density(uniform(CAUSAL), GROUP[:, :5], CAUSAL)
    with pytest.raises(ValueError, match=r"queries \(1, 1\)"):  # which would broadcast
        density(uniform(CAUSAL), GROUP, CAUSAL, queries=torch.ones(1, 1).bool())
    with pytest.raises(ValueError, match=r"tokens \(1, 5\)"):
        density(uniform(CAUSAL), GROUP, CAUSAL, tokens=GROUP[:, :5], causal_correction=False)
    with pytest.raises(ValueError, match=r"tokens \(1, 5\)"):
        token_groups(GROUP, GROUP[:, :5])


def test_groups_cover_what_is_no_padding_once() -> None:
    vision = torch.tensor([[0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    groups = token_groups(vision, real)
    assert groups.system.tolist() == [[False, True] + [False] * 5, [False] * 7]
    assert groups.text.int().tolist() == [[0, 0, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 0, 0]]
    assert torch.equal(groups.tokens, real.bool())


def model_and_inputs(decoder: str = "qwen2", padding: str = "left") -> tuple[Any, dict[str, torch.Tensor]]:
    model = build_llava(decoder)
    with torch.no_grad():
        for layer in model.model.language_model.layers:  # far from uniform
            for weight in layer.self_attn.parameters():
                weight.mul_(4)
    if decoder == "gemma2":  # the usual cap of 50 would bend little here
        for layer in model.model.language_model.layers:
            layer.self_attn.attn_logit_softcapping = 2.0
    return model, batch(model, (1, 2, 0), padding=padding)


def by_loops(model: Any, inputs: dict[str, torch.Tensor], rows: torch.Tensor, corrected: bool) -> torch.Tensor:
    """(layers, B, heads), eq. 1 for vision tokens by its words, from eager attention maps; rows is (B, S) bool."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    result = torch.full((len(maps), *maps[0].shape[:2]), math.nan)
    for layer, sample, head in torch.cartesian_prod(*map(torch.arange, result.shape)).tolist():
        values = []
        for row in rows[sample].nonzero().flatten().tolist():
            keys = [s for s in range(row + 1 if corrected else ids.shape[1]) if real[sample, s]]
            vision = [s for s in keys if ids[sample, s] == IMAGE_TOKEN]
            if vision:
                alpha = sum(maps[layer][sample, head, row, s].item() for s in vision if s <= row)
                values.append(alpha / (len(vision) / len(keys)))
        if values:
            result[layer, sample, head] = sum(values) / len(values)
    return result


def last(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    real = inputs["attention_mask"].bool()
    rows = torch.zeros_like(real)
    for sample, mask in enumerate(real):
        rows[sample, mask.nonzero()[-1]] = True
    return rows


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("decoder", DECODER_CONFIGS)
def test_densities_are_those_of_eager_attention(decoder: str, padding: str) -> None:
    model, inputs = model_and_inputs(decoder, padding)
    expected = by_loops(model, inputs, last(inputs), True)
    found = attention_density(model, inputs)
    torch.testing.assert_close(found.vision, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert found.vision[:, 2].isnan().all()
    assert found.vision[:, :2].std() > 0.05
    assert found.queries.tolist() == [1, 1, 1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_query_choices_against_loops(implementation: str) -> None:
    model, inputs = model_and_inputs()
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    text = real & (ids != IMAGE_TOKEN) & ((ids == IMAGE_TOKEN).cumsum(1) > 0)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    answer = torch.zeros_like(real)
    answer[:, -3:-1] = True
    for choice, rows in {"text": text, "answer": answer}.items():
        for corrected in (True, False):
            found = attention_density(model, {**inputs, "labels": labels}, queries=choice, causal_correction=corrected)
            expected = by_loops(model, inputs, rows, corrected)
            torch.testing.assert_close(found.vision, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
            assert torch.equal(found.queries, rows.sum(1))
            by_mask = attention_density(model, inputs, queries=rows, causal_correction=corrected)
            torch.testing.assert_close(by_mask.vision, found.vision, rtol=0, atol=0, equal_nan=True)


def test_a_sliding_window_is_what_the_query_sees() -> None:
    model, inputs = model_and_inputs("mistral")
    config = model.config.text_config
    wide = attention_density(model, inputs).vision
    config.sliding_window = 4  # the last of two images lies 2 + 2 text tokens back
    for layer in model.model.language_model.layers:
        layer.self_attn.sliding_window = 4
    found = attention_density(model, inputs)
    assert found.vision[:, 0].isnan().all()
    torch.testing.assert_close(found.text[:, 0], torch.ones_like(found.text[:, 0]))
    assert not wide[:, 0].isnan().any()


def test_the_three_groups_share_all_attention() -> None:
    model, inputs = model_and_inputs()
    found = attention_density(model, inputs)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    groups = token_groups(ids == IMAGE_TOKEN, real)
    total = sum(
        getattr(found, name).nan_to_num() * (getattr(groups, name).sum(1) / real.sum(1))[None, :, None]
        for name in ("vision", "text", "system")
    )
    torch.testing.assert_close(total, torch.ones_like(total))


def test_the_curve_is_the_mean_over_heads_and_samples_with_images() -> None:
    model, inputs = model_and_inputs()
    found = attention_density(model, inputs)
    torch.testing.assert_close(found.per_layer(), found.vision[:, :2].mean((1, 2)))
    torch.testing.assert_close(found.per_layer("text"), found.text.mean((1, 2)))
    with pytest.raises(ValueError, match="group='image'"):
        found.per_layer("image")


@pytest.mark.parametrize("layers", [[1], [1, 3]])
def test_blocks_change_the_densities_behind_them(layers: list[int]) -> None:
    model, inputs = model_and_inputs()
    plain = attention_density(model, inputs).vision
    handle = attach_vision_remember(model, layers)
    torch.testing.assert_close(attention_density(model, inputs).vision, plain, rtol=0, atol=0, equal_nan=True)
    randomise(handle)
    found = attention_density(model, inputs).vision
    torch.testing.assert_close(found, by_loops(model, inputs, last(inputs), True), rtol=1e-4, atol=1e-6, equal_nan=True)
    assert torch.equal(found[0, :2], plain[0, :2])
    assert not torch.allclose(found[1, :2], plain[1, :2], atol=1e-3)


def implementations(model: Any) -> list[Any]:
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return [config._attn_implementation for config in configs]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_tables_are_as_before(fails: bool) -> None:
    model, inputs = model_and_inputs()
    attention_density(model, inputs)  # transformers leaves hooks of its own in a first pass
    before, names = Fingerprint(model), implementations(model)
    tables = [dict(table) for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
    if fails:
        with pytest.raises(ValueError, match="tokens"):
            attention_density(model, {**inputs, "pixel_values": inputs["pixel_values"][:1]})
    else:
        attention_density(model, inputs)
    before.check(model)
    assert implementations(model) == names
    assert [dict(table) for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)] == tables


@pytest.mark.parametrize("decoder", ["qwen2", "gemma2"])
def test_the_outputs_of_a_pass_that_is_read_are_those_of_any_other(decoder: str) -> None:
    model, inputs = model_and_inputs(decoder)
    if decoder == "gemma2":  # older transformers run it on a kernel that leaves its soft cap out
        model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs).logits
    base, seen = model.model, []
    with (
        torch.no_grad(),
        attention_rows(
            base.language_model,
            base.language_model.layers,
            torch.zeros(3, 1, dtype=torch.long),
            lambda *_: seen.append(1),
        ),
    ):
        found = model(**inputs).logits
        other = threading.Thread(target=lambda: model.model.language_model(input_ids=inputs["input_ids"]))
        other.start()
        other.join()
    assert len(seen) == 4  # not those of the other thread
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


def test_threads_measure_one_after_the_other() -> None:
    """Each puts back what it found, so that the last of two at once would leave the first one's function behind."""
    model, inputs = model_and_inputs()
    expected, names = attention_density(model, inputs), implementations(model)
    found = []
    threads = [threading.Thread(target=lambda: found.append(attention_density(model, inputs))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for measured in found:
        torch.testing.assert_close(measured.vision, expected.vision, rtol=0, atol=0, equal_nan=True)
    assert implementations(model) == names


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_pass_of_another_thread_outlives_the_reading(implementation: str) -> None:
    """Its mask is made while this thread reads, its layers run afterwards."""
    model, inputs = model_and_inputs()
    model.set_attn_implementation(implementation)
    decoder, ids = model.model.language_model, inputs["input_ids"]
    with torch.no_grad():
        expected = decoder(input_ids=ids).last_hidden_state
    begun, go_on, found = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        begun.set()
        assert go_on.wait(60)

    def work() -> None:
        with torch.no_grad():
            found.append(decoder(input_ids=ids).last_hidden_state)

    handle = decoder.layers[0].register_forward_pre_hook(wait)
    thread = threading.Thread(target=work)
    with attention_rows(decoder, decoder.layers, torch.zeros(3, 1, dtype=torch.long), lambda *_: None):
        thread.start()
        assert begun.wait(60)
    go_on.set()
    thread.join()
    handle.remove()
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fastv", "uniform"])
def test_a_pruned_model_is_measured_whole_or_not_at_all(name: str) -> None:
    model, inputs = model_and_inputs()
    expected = attention_density(model, inputs)
    handle = attach_pruner(model, name)
    with pytest.raises(ValueError, match=r"a pruner is attached.*disabled\(\)"):
        attention_density(model, inputs)
    with handle.disabled():
        found = attention_density(model, inputs).vision
    torch.testing.assert_close(found, expected.vision, rtol=0, atol=0, equal_nan=True)


def test_errors_say_what_came() -> None:
    model, inputs = model_and_inputs()
    with pytest.raises(ValueError, match="queries='first'"):
        attention_density(model, inputs, queries="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"inputs\['labels'\] of shape"):
        attention_density(model, inputs, queries="answer")
    with pytest.raises(ValueError, match="no position is left"):
        attention_density(model, inputs, queries=~inputs["attention_mask"].bool())
    with pytest.raises(ValueError, match="expected a bool mask"):
        attention_density(model, inputs, queries=inputs["attention_mask"])
    with pytest.raises(ValueError, match="expected input_ids"):
        attention_density(model, {"pixel_values": inputs["pixel_values"]})
    with pytest.raises(ValueError, match="no eager_attention_forward"):
        eager_function(torch.nn.Linear(1, 1))
