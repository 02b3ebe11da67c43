"""Where weights are and what they are made of: device maps, offloading, meta tensors, dtypes, quantised linears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from tests.fingerprint import structure
from tests.hosts import IMAGE_TOKEN, batch, build_llava, randomise
from tests.processors import llava_processor
from vision_remember import attach_vision_remember, compress_projector, detach_vision_remember
from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.load import restore_vision_remember
from vision_remember.adapters.processor import PlaceholderCount

LAYERS = [1, 3]
GENERATE = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def attached(model: Any) -> Any:
    torch.manual_seed(0)
    randomise(attach_vision_remember(model, LAYERS))
    return model


def cpu_offloaded(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def disk_offloaded(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def dispatched(model: Any, folder: Path) -> Any:
    """Two decoder layers, one of which has a block, on disk; the rest in memory."""
    decoder = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    inner = [f"model.language_model.{name}" for name in decoder]
    memory = ["lm_head", "model.vision_tower", "model.multi_modal_projector", *inner]
    places = {**dict.fromkeys(memory, "cpu"), **{f"model.language_model.layers.{index}": "disk" for index in (2, 3)}}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS = [cpu_offloaded, disk_offloaded, dispatched]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_attached_model_can_be_offloaded(offload: Any, tmp_path: Path) -> None:
    model = attached(build_llava())
    inputs = batch(model)
    expected, tokens = logits(model, **inputs), model.generate(**inputs, **GENERATE)
    model = offload(model, tmp_path)
    assert any(p.device.type == "meta" for n, p in model.named_parameters() if "vision_remember" in n)
    assert torch.equal(logits(model, **inputs), expected)
    assert torch.equal(model.generate(**inputs, **GENERATE), tokens)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("options", [{"absorb": True}, {"fusion": "mix"}, {"fusion": "mbtf"}], ids=str)
def test_weights_are_read_through_their_modules_which_bring_them(
    options: dict[str, Any], offload: Any, tmp_path: Path
) -> None:
    model = build_llava()
    torch.manual_seed(0)
    randomise(attach_vision_remember(model, LAYERS, **options))
    inputs = batch(model)
    expected = logits(model, **inputs)
    torch.testing.assert_close(logits(offload(model, tmp_path), **inputs), expected)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_model_can_be_attached_to(offload: Any, tmp_path: Path) -> None:
    model = attached(build_llava())
    inputs = batch(model)
    expected, tokens = logits(model, **inputs), model.generate(**inputs, **GENERATE)
    model = attached(offload(build_llava(), tmp_path))
    assert torch.equal(logits(model, **inputs), expected)
    assert torch.equal(model.generate(**inputs, **GENERATE), tokens)
    detach_vision_remember(model)
    assert torch.equal(logits(model, **inputs), logits(build_llava(), **inputs))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_adapter_is_saved_with_its_weights(offload: Any, tmp_path: Path) -> None:
    model, processor = build_llava(), llava_processor("clip", 32, 4)
    compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    handle = VisionRememberHandle(find_attachment(attached(model)))
    handle.save_pretrained(tmp_path / "expected")
    offload(model, tmp_path / "weights")
    handle.save_pretrained(tmp_path / "made")
    made, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("made", "expected"))
    torch.testing.assert_close(made, expected, atol=0, rtol=0)


def test_weights_that_are_out_of_reach_are_an_error_not_an_adapter(tmp_path: Path) -> None:
    model = build_llava()
    handle = attach_vision_remember(model, LAYERS)
    handle.save_pretrained(tmp_path / "adapter")
    handle.module.to("meta")
    with pytest.raises(
        ValueError, match=r"weights of the adapter are on the meta device \(vision_remember.1.norm.weight,"
    ):
        handle.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"weights of the adapter are on the meta device \(vision_remember.1.norm.weight,"
    ):
        restore_vision_remember(model, tmp_path / "adapter")


def test_an_offloaded_projector_cannot_be_compressed(tmp_path: Path) -> None:
    model, processor = cpu_offloaded(build_llava(), tmp_path), llava_processor("clip", 32, 4)
    before, count = structure(model), PlaceholderCount.read(processor)
    with pytest.raises(
        ValueError, match=r"LlavaMultiModalProjector are on the meta device .* compress the projector after loading"
    ):
        compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    assert (structure(model), PlaceholderCount.read(processor)) == (before, count)


@pytest.mark.parametrize("layer", [2, 3], ids=["first layer of its device", "later layer"])
def test_layers_on_a_second_device(layer: int) -> None:
    """The meta device is the second one: it computes no numbers, but it refuses tensors of another."""
    model = build_llava()
    attach_vision_remember(model, [layer])
    decoder = {"embed_tokens": "cpu", "rotary_emb": "cpu", "norm": "meta"}
    decoder |= {f"layers.{index}": "meta" if index > 1 else "cpu" for index in range(4)}
    places = {"lm_head": "meta", "model.vision_tower": "cpu", "model.multi_modal_projector": "cpu"}
    places |= {f"model.language_model.{name}": device for name, device in decoder.items()}
    model = accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    model._hf_hook.io_same_device = False
    calls = []
    model.model.language_model.layers[layer].vision_remember.register_forward_hook(
        lambda block, args, output: calls.append(output.device.type)
    )
    assert logits(model, **batch(model)).device.type == "meta"
    assert calls == ["meta"]


def test_a_model_loaded_by_device_map_in_bfloat16(tmp_path: Path) -> None:
    build_llava().save_pretrained(tmp_path)
    model = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    inputs = batch(model)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    plain = logits(model, **inputs)
    handle = attach_vision_remember(model, LAYERS)
    assert {p.dtype for p in handle.module.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model, **inputs), plain)
    detach_vision_remember(model)
    remembered = logits(attached(model), **inputs)
    # Loaded, the rotary frequencies stay in float32; converted, they do not.
    torch.testing.assert_close(remembered, logits(attached(build_llava().bfloat16()), **inputs), atol=0.05, rtol=0.05)
    assert not torch.allclose(remembered, plain, atol=0.2, rtol=0.2)


def test_empty_weights_are_refused_and_filled_ones_are_not() -> None:
    with accelerate.init_empty_weights():
        model = hf.LlavaForConditionalGeneration(build_llava().config)
    with pytest.raises(ValueError, match="meta device: load them before attaching"):
        attach_vision_remember(model, LAYERS)
    weights = build_llava()
    model.load_state_dict(weights.state_dict(), assign=True)
    # Buffers that are in no state dict, as from_pretrained fills them.
    for (_, buffer), (name, _) in zip(weights.named_buffers(), list(model.named_buffers()), strict=True):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer
    inputs = batch(model)
    assert torch.equal(logits(attached(model.eval()), **inputs), logits(attached(weights), **inputs))


def quantised(model: Any) -> Any:
    """The decoder's own linears in int8, activations quantised as they come."""
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            torch.ao.quantization.quantize_dynamic(part, {nn.Linear}, torch.qint8, inplace=True)
    return model


def with_an_integer_weight(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)


def test_a_phase_that_would_train_quantised_weights_changes_nothing() -> None:
    model = build_llava()
    with_an_integer_weight(model.model.language_model.layers[0].mlp.up_proj)
    handle = attach_vision_remember(model, LAYERS)
    handle.set_phase(1)
    before = structure(model)
    with pytest.raises(ValueError, match=r"the language model has weights of torch.int8: quantised ones do not train"):
        handle.set_phase(2)
    assert structure(model) == before
    with_an_integer_weight(model.model.multi_modal_projector.linear_1)
    with pytest.raises(ValueError, match=r"the projector has weights of torch.int8"):
        handle.set_phase(1)


def test_a_quantised_projector_cannot_be_compressed() -> None:
    model = build_llava()
    with_an_integer_weight(model.model.multi_modal_projector.linear_1)
    before = structure(model)
    with pytest.raises(
        ValueError, match=r"LlavaMultiModalProjector has weights of torch.int8, which could not be copied"
    ):
        compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    assert structure(model) == before


def linears(model: Any) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules() if "proj" in name and "vision_remember" not in name}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_quantised_linears_are_left_alone() -> None:
    model = quantised(build_llava())
    inputs, before = batch(model), linears(model)
    assert list(before.values()).count(nn.quantized.dynamic.Linear) == 4 * 7
    plain = logits(model, **inputs)
    torch.manual_seed(0)
    handle = attach_vision_remember(model, LAYERS)
    assert linears(model) == before
    assert not [m for m in handle.module.modules() if isinstance(m, nn.quantized.dynamic.Linear)]
    assert {p.dtype for p in handle.module.parameters()} == {torch.float32}
    assert torch.equal(logits(model, **inputs), plain)
    randomise(handle)
    remembered = logits(model, **inputs)
    assert not torch.allclose(remembered, plain, atol=0.1)
    assert torch.equal(remembered, logits(quantised(attached(build_llava())), **inputs))
    tokens = model.generate(**inputs, **GENERATE)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + GENERATE["max_new_tokens"]


def test_weights_in_pieces_are_not_saved(tmp_path: Path) -> None:
    """What shards a model may leave an empty tensor in a weight's place."""
    handle = attach_vision_remember(build_llava(), LAYERS)
    handle.module["3"].norm.weight.data = torch.empty(0)
    with pytest.raises(
        ValueError, match=r"vision_remember\.3\.norm\.weight has shape \(0,\), but whole it has \(48,\)"
    ):
        handle.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
