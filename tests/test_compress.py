"""Fewer tokens, in the model and in the processor together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from tests.fingerprint import Fingerprint
from tests.hosts import ENCODER_CONFIGS, IMAGE_TOKEN, VOCABULARY, batch, build_llava, randomise
from tests.processors import llava_processor
from tests.zoo import call_inputs
from tests.zoo_checks import subject
from vision_remember import attach_vision_remember, compress_projector, load_vision_remember
from vision_remember.adapters.resolve import resolve

# The grids of CLIP-L/14-336 and SigLIP-so400m/14-384.
REAL_SIZES = {"clip": (336, 14, 576, 144), "siglip": (384, 14, 729, 196)}


def real_sized(encoder: str) -> tuple[Any, Any]:
    """A narrow LLaVA with the grid of the real encoder, and its processor."""
    side, patch, *_ = REAL_SIZES[encoder]
    text = hf.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    vision = ENCODER_CONFIGS[encoder]()
    vision.update({"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2})
    vision.update({"image_size": side, "patch_size": patch})
    strategy = "default" if encoder == "clip" else "full"
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_select_strategy=strategy
    )
    return hf.LlavaForConditionalGeneration(config).eval(), llava_processor(encoder, side, patch)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (200, 310, 3), dtype=np.uint8)


def ask(processor: Any, images: int) -> dict[str, torch.Tensor]:
    text = "w3 " + "<image> w4 " * images + "w5"
    return processor(text=[text], images=[picture(i) for i in range(images)], return_tensors="pt")


@pytest.mark.parametrize("encoder", REAL_SIZES)
def test_processor_and_projector_agree_before_during_and_after(encoder: str) -> None:
    model, processor = real_sized(encoder)
    *_, full, pooled = REAL_SIZES[encoder]
    before, counts = Fingerprint(model), dict(processor.__dict__)

    def tokens() -> int:
        inputs = ask(processor, 2)
        with torch.no_grad():
            model(**inputs)  # raises if placeholders and features disagree
        return int((inputs["input_ids"] == IMAGE_TOKEN).sum()) // 2

    assert tokens() == full
    before = Fingerprint(model)
    handle = compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    assert tokens() == pooled
    assert processor._get_num_multimodal_tokens is not None
    assert str(pooled) in str(handle)
    assert list(model.state_dict()) == list(before.tensors)
    vr = attach_vision_remember(model, [1])
    assert tokens() == pooled
    generated = model.generate(**ask(processor, 1), max_new_tokens=2, suppress_tokens=[IMAGE_TOKEN])
    assert generated.shape[1] == ask(processor, 1)["input_ids"].shape[1] + 2
    vr.detach()
    handle.restore()
    before.check(model)
    assert dict(processor.__dict__) == counts
    assert tokens() == full


@pytest.mark.parametrize("out_grid", [(12, 12), (5, 7), (1, 1), (24, 24)])
def test_any_grid_can_be_asked_for(out_grid: tuple[int, int]) -> None:
    model, processor = real_sized("clip")
    compress_projector(model, processor, "adaptive_avg_pool", out_grid=out_grid)
    inputs = ask(processor, 1)
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == out_grid[0] * out_grid[1]
    with torch.no_grad():
        model(**inputs)


def test_the_pooled_projector_keeps_what_the_projector_learned() -> None:
    model = build_llava()
    inputs = batch(model, (1,))
    with torch.no_grad():
        expected = model(**inputs).logits
        compress_projector(model, None, "adaptive_avg_pool", out_grid=(8, 8))  # as many tokens as cells: nothing pooled
        torch.testing.assert_close(model(**inputs).logits, expected)


def test_training_the_swapped_projector_leaves_the_own_one_alone() -> None:
    model = build_llava()
    before = Fingerprint(model)
    handle = compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()
    handle.restore()
    before.check(model)


def test_bad_requests_change_neither_model_nor_processor() -> None:
    model, processor = real_sized("clip")
    before, counts = Fingerprint(model), dict(processor.__dict__)
    requests: list[tuple[dict[str, Any], str]] = [
        ({"name": "adaptive_avg_pol", "ratio": 4}, "did you mean 'adaptive_avg_pool'"),
        ({"ratio": 5}, "ratio=5: expected the square"),
        ({"ratio": "4"}, "ratio='4': expected the square"),
        ({"ratio": 4.0}, "ratio=4.0: expected the square"),
        ({"ratio": 4, "out_grid": (2, 2)}, "exactly one of the two"),
        ({}, "exactly one of the two"),
        ({"out_grid": (25, 3)}, "at most the features' grid 24x24"),
        ({"out_grid": (0, 3)}, "positive integers"),
        ({"ratio": 4, "bais": True}, "did you mean 'bias'"),
    ]
    for request, message in requests:
        with pytest.raises(ValueError, match=message):
            compress_projector(model, processor, **{"name": "adaptive_avg_pool", **request})
        before.check(model)
        assert dict(processor.__dict__) == counts


def test_a_processor_of_another_model_is_refused() -> None:
    model, _ = real_sized("clip")
    before = Fingerprint(model)
    with pytest.raises(ValueError, match=r"emits 729 image tokens .* makes 576"):
        compress_projector(model, llava_processor("siglip", 384, 14), "adaptive_avg_pool", ratio=4)
    with pytest.raises(ValueError, match="cannot process an image"):
        compress_projector(model, object(), "adaptive_avg_pool", ratio=4)
    before.check(model)


@pytest.mark.parametrize("encoder", REAL_SIZES)
def test_a_processor_that_was_saved_compressed_serves_a_fresh_model(encoder: str, tmp_path: Path) -> None:
    model, processor = real_sized(encoder)
    *_, full, pooled = REAL_SIZES[encoder]
    compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    attach_vision_remember(model, [1]).save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "processor")
    twin, saved = real_sized(encoder)[0], type(processor).from_pretrained(tmp_path / "processor")
    handle = load_vision_remember(twin, tmp_path / "adapter", saved)

    def tokens() -> int:
        inputs = ask(saved, 1)
        with torch.no_grad():
            twin(**inputs)  # raises if placeholders and features disagree
        return int((inputs["input_ids"] == IMAGE_TOKEN).sum())

    assert tokens() == pooled
    handle.detach()
    handle.compression.restore()
    assert tokens() == full
    compress_projector(real_sized(encoder)[0], saved, "adaptive_avg_pool", ratio=9)
    with pytest.raises(ValueError, match=rf"emits {full // 9} image tokens .* makes {full}"):
        compress_projector(twin, saved, "adaptive_avg_pool", ratio=4)


@pytest.mark.parametrize("projector", ["adaptive_avg_pool", "qformer"])
@pytest.mark.parametrize("model_type", ["vipllava", "video_llava", "janus"])
def test_an_adapter_of_a_host_that_was_found_out_loads_with_its_projector(
    model_type: str, projector: str, tmp_path: Path
) -> None:
    host = subject(model_type)
    model, twin = host.model, copy.deepcopy(host.model)
    vision = model.config.vision_config

    def processor() -> Any:
        encoder = "clip" if host.parts.encoder_spec.name == "clip" else "siglip"
        return llava_processor(encoder, vision.image_size, vision.patch_size)

    compress_projector(model, processor(), projector, ratio=4)
    inputs = call_inputs(model, resolve(model))
    handle = attach_vision_remember(model, [1, 2])
    randomise(handle)
    handle.save_pretrained(tmp_path / "adapter")
    loaded = load_vision_remember(twin, tmp_path / "adapter", processor())
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    loaded.detach()
    loaded.compression.restore()
    assert resolve(twin).spec == handle.spec == host.parts.spec
    with torch.no_grad():
        assert torch.equal(twin(**host.inputs).logits, host.alone)


def test_a_processor_that_keeps_its_own_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = real_sized("clip")
    before = Fingerprint(model)
    monkeypatch.setattr(type(processor), "replace_image_token", lambda self, *_, **__: self.image_token * 576)
    with pytest.raises(ValueError, match="the processor emits 576 image tokens, the projector 144"):
        compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    before.check(model)
    assert processor.patch_size == 14


def test_swapping_has_an_order() -> None:
    model = build_llava()
    handle = compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    with pytest.raises(RuntimeError, match="compressed already"):
        compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    vr = attach_vision_remember(model, [1])
    with pytest.raises(RuntimeError, match="detach it first"):
        handle.restore()
    vr.detach()
    handle.restore()
    with pytest.raises(RuntimeError, match="restored already"):
        handle.restore()
    attach_vision_remember(model, [1])
    with pytest.raises(RuntimeError, match="compress the projector first"):
        compress_projector(model, None, "adaptive_avg_pool", ratio=4)


def test_a_budget_moves_projector_and_processor_together() -> None:
    model, processor = real_sized("clip")
    handle = compress_projector(model, processor, "matryoshka", ratio=4)
    attachment = attach_vision_remember(model, [1])

    def tokens() -> int:
        inputs = ask(processor, 2)
        with torch.no_grad():
            output = model(**inputs).logits
            with attachment.disabled():
                assert torch.equal(model(**inputs).logits, output), "blocks are identities, on any grid"
        return int((inputs["input_ids"] == IMAGE_TOKEN).sum()) // 2

    assert tokens() == 144
    for budget, grid in ((36, (6, 6)), (576, (24, 24)), (1, (1, 1))):
        handle.set_budget(budget)
        assert (tokens(), handle.token_grid) == (budget, grid)
        assert f"= {budget} tokens" in str(handle)
    handle.set_budget(None)
    assert (tokens(), handle.token_grid) == (144, (12, 12))
    handle.set_budget(9)
    attachment.detach()
    handle.restore()
    assert int((ask(processor, 1)["input_ids"] == IMAGE_TOKEN).sum()) == 576
    with pytest.raises(RuntimeError, match="restored already"):
        handle.set_budget(36)


def test_a_loaded_adapter_still_sets_its_budget(tmp_path: Path) -> None:
    model, processor = real_sized("clip")
    compress_projector(model, processor, "matryoshka", ratio=4)
    attach_vision_remember(model, [1]).save_pretrained(tmp_path)
    fresh, other = real_sized("clip")
    handle = load_vision_remember(fresh, tmp_path, other)
    assert handle.compression is not None
    handle.compression.set_budget(36)
    assert int((ask(other, 1)["input_ids"] == IMAGE_TOKEN).sum()) == 36


def test_a_block_reads_at_every_budget() -> None:
    """With blocks that do something: the memory has the grid of the call, not of attach."""
    model, processor = real_sized("clip")
    handle = compress_projector(model, processor, "matryoshka", ratio=4)
    attachment = attach_vision_remember(model, [1], zero_init=False)
    for budget in (144, 36):
        handle.set_budget(budget)
        inputs = ask(processor, 1)
        with torch.no_grad():
            output = model(**inputs).logits
            with attachment.disabled():
                assert not torch.allclose(model(**inputs).logits, output)


@pytest.mark.parametrize("with_processor", [True, False], ids=["processor", "no processor"])
def test_a_budget_that_cannot_be_changes_nothing(with_processor: bool) -> None:
    model, processor = real_sized("clip")
    handle = compress_projector(model, processor if with_processor else None, "matryoshka", ratio=4)
    handle.set_budget(36)
    counts = dict(processor.__dict__)
    for wrong, message in (
        (100, "24x24 nest into 1, 4, 9"),
        (0, "tokens=0"),
        (2.5, "tokens=2.5"),
        (True, "tokens=True"),
    ):
        with pytest.raises(ValueError, match=message):
            handle.set_budget(wrong)  # type: ignore[arg-type]
        assert dict(processor.__dict__) == counts
        assert (handle.projector.budget, handle.token_grid) == (36, (6, 6))


def test_a_processor_that_stops_counting_keeps_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = real_sized("clip")
    handle = compress_projector(model, processor, "matryoshka", ratio=4)
    monkeypatch.setattr(type(processor), "replace_image_token", lambda self, *_, **__: self.image_token * 144)
    counts = dict(processor.__dict__)
    with pytest.raises(ValueError, match="the processor emits 144 image tokens, the projector 36"):
        handle.set_budget(36)
    assert dict(processor.__dict__) == counts
    assert (handle.projector.budget, handle.token_grid) == (None, (12, 12))


def test_only_nested_token_counts_have_budgets() -> None:
    handle = compress_projector(build_llava(), None, "adaptive_avg_pool", ratio=4)
    with pytest.raises(ValueError, match="AdaptiveAvgPool has one token count; only 'matryoshka'"):
        handle.set_budget(4)
