"""PEFT around and inside: whichever came first, the blocks train, and what was trained is saved and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.fingerprint import Fingerprint, structure
from tests.hosts import IMAGE_TOKEN, batch, build_llava, randomise, set_checkpointing
from tests.processors import llava_processor
from vision_remember import attach_vision_remember, compress_projector, detach_vision_remember, load_vision_remember
from vision_remember.adapters.processor import PlaceholderCount

# PEFT asks for names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

LAYERS = [1, 3]
# The names that LoRA recipes list. Some of them are names of the vision encoder's linears too.
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "linear_1"]
OURS = ["vision_remember", "multi_modal_projector"]


def host() -> Any:
    model = build_llava()
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    return model


def lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": r".*language_model.*\.[qv]_proj", **options}
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def built(order: str) -> tuple[Any, Any]:
    """A PEFT model with blocks that change the output, and the handle."""
    model = host()
    if order == "LoRA, then attach":
        model = lora(model)
        handle = attach_vision_remember(model, LAYERS)
    else:
        handle = attach_vision_remember(model, LAYERS)
        model = lora(model, modules_to_save=OURS if order == "attach, then LoRA with the blocks" else None)
    randomise(handle)
    return model, handle


ORDERS = ["LoRA, then attach", "attach, then LoRA", "attach, then LoRA with the blocks"]


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def train(model: Any, inputs: dict[str, torch.Tensor], steps: int = 3) -> dict[str, torch.Tensor]:
    """Trains what requires a gradient; returns the first step's gradients."""
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2)
    first = {}
    for _ in range(steps):
        optimiser.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        first = first or {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        optimiser.step()
    model.eval()
    return first


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_and_adapters_get_gradients(order: str) -> None:
    model, handle = built(order)
    handle.module.requires_grad_(True)
    inputs = batch(model.get_base_model())
    gradients = train(model, inputs, steps=1)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    blocks = {name for name in trainable if "vision_remember" in name and "original_module" not in name}
    assert len(blocks) == 2 * 8
    assert all(gradients[name].abs().sum() > 0 for name in blocks)
    assert all(gradients[name].abs().sum() > 0 for name in trainable if "lora_B" in name)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(order: str, use_reentrant: bool) -> None:
    model, handle = built(order)
    handle.module.requires_grad_(True)
    inputs = batch(model.get_base_model())
    expected = train(model, inputs, steps=1)
    model, handle = built(order)
    handle.module.requires_grad_(True)
    set_checkpointing(model.get_base_model(), use_reentrant=use_reentrant)
    model.enable_input_require_grads()
    actual = train(model, inputs, steps=1)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("order", ORDERS)
def test_phases_are_refused_where_peft_chooses_what_trains(order: str) -> None:
    """They would freeze LoRA and train what it adapts."""
    model, handle = built(order)
    before = structure(model)["trainable"]
    with pytest.raises(ValueError, match="in a PEFT model, PEFT chooses what trains"):
        handle.set_phase(2)
    assert structure(model)["trainable"] == before
    model.merge_and_unload()
    handle.set_phase(1)


def test_usual_targets_do_not_match_the_blocks() -> None:
    model = host()
    attach_vision_remember(model, LAYERS)
    names = [name for name, _ in lora(model, target_modules=USUAL).named_parameters() if "lora_A" in name]
    assert any("language_model" in name for name in names)
    assert not [name for name in names if "vision_remember" in name]


def test_all_linear_matches_the_blocks_unless_they_are_excluded() -> None:
    """As the documentation says."""
    model = host()
    attach_vision_remember(model, LAYERS)
    names = [name for name, _ in lora(model, target_modules="all-linear").named_parameters() if "lora_A" in name]
    assert any("vr_query" in name for name in names)

    model = host()
    randomise(attach_vision_remember(model, LAYERS))
    wrapped = lora(
        model,
        target_modules="all-linear",
        exclude_modules=r".*(vision_remember|multi_modal_projector).*",
        modules_to_save=OURS,
    )
    names = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert not [name for name in names if "vision_remember" in name and "lora" in name]
    gradients = train(wrapped, batch(model), steps=1)
    blocks = [name for name in gradients if "vision_remember" in name]
    assert len(blocks) == 2 * 8
    assert all(gradients[name].abs().sum() > 0 for name in blocks)


def test_an_encoder_that_peft_copied_is_named() -> None:
    model = host()
    attach_vision_remember(model, LAYERS)
    wrapped = lora(model, modules_to_save=["vision_tower"])
    with pytest.raises(ValueError, match=r"'model.vision_tower' was .* copied .* attach behind get_peft_model"):
        wrapped(**batch(model))


def test_an_encoder_that_peft_trains_whole_is_read_once_attached_behind() -> None:
    plain, wrapped = host(), lora(host(), modules_to_save=["vision_tower"])
    inputs, before = batch(plain), structure(wrapped)
    for model in (plain, wrapped):
        torch.manual_seed(0)
        handle = attach_vision_remember(model, LAYERS)
        randomise(handle)
    torch.testing.assert_close(logits(wrapped, inputs), logits(plain, inputs), atol=1e-5, rtol=1e-5)
    weight = wrapped.get_base_model().model.vision_tower.modules_to_save["default"].encoder.layers[0].mlp.fc1.weight
    with handle.disabled():
        wrapped(**inputs).logits.sum().backward()
    alone, weight.grad = weight.grad, None
    wrapped(**inputs).logits.sum().backward()
    assert not torch.allclose(weight.grad, alone, rtol=0.1)
    expected = logits(wrapped, inputs)
    handle.detach()
    assert structure(wrapped)["modules"] == before["modules"]
    torch.manual_seed(0)
    randomise(attach_vision_remember(wrapped, LAYERS))
    torch.testing.assert_close(logits(wrapped.merge_and_unload(), inputs), expected, atol=1e-5, rtol=1e-5)


def test_what_lora_learns_inside_the_blocks_is_no_adapter_folder(tmp_path: Path) -> None:
    model = host()
    handle = attach_vision_remember(model, LAYERS)
    handle.save_pretrained(tmp_path / "adapter")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    wrapped = lora(model, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"adapter around vision_remember.1.interaction.vr_query, which no adapter"):
        handle.save_pretrained(tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == saved
    wrapped.merge_and_unload()
    handle.save_pretrained(tmp_path / "merged")
    load_vision_remember(build_llava(), tmp_path / "merged", llava_processor("clip", 32, 4))


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_a_projector_that_peft_trained_can_be_restored(how: str) -> None:
    model, processor = build_llava(), llava_processor("clip", 32, 4)
    before, count = Fingerprint(model), PlaceholderCount.read(processor)
    compression = compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    handle = attach_vision_remember(model, LAYERS)
    wrapped = lora(model, modules_to_save=OURS)
    trained = train(wrapped, batch(model))
    assert any(OURS[1] in name for name in trained)
    handle.detach()
    with pytest.raises(RuntimeError, match="a ModulesToSaveWrapper stands in its place"):
        compression.restore()
    getattr(wrapped, how)()
    compression.restore()
    assert PlaceholderCount.read(processor) == count
    state = model.model.multi_modal_projector.state_dict()
    assert all(torch.equal(tensor, before.tensors[f"model.{OURS[1]}.{name}"]) for name, tensor in state.items())
    with pytest.raises(RuntimeError, match="restored already"):
        compression.restore()


@pytest.mark.parametrize("options", [{"target_modules": "all-linear"}, {"modules_to_save": [OURS[1]]}])
def test_a_projector_that_peft_adapts_is_not_swapped(options: dict[str, Any]) -> None:
    model = lora(build_llava(), **options)
    before = structure(model)
    with pytest.raises(ValueError, match="compress the projector first, then get_peft_model"):
        compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    assert structure(model) == before


@pytest.mark.parametrize("order", ORDERS)
def test_merging_keeps_the_logits_and_generate(order: str) -> None:
    model, handle = built(order)
    handle.module.requires_grad_(True)
    inputs = batch(model.get_base_model())
    train(model, inputs)
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
    expected, tokens = logits(model, inputs), model.generate(**inputs, **options)
    merged = model.merge_and_unload()
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "modules_to_save" in name]
    torch.testing.assert_close(logits(merged, inputs), expected, atol=2e-4, rtol=1e-4)
    assert torch.equal(merged.generate(**inputs, **options), tokens)
    # What is left is an attached model like any other.
    with handle.disabled():
        assert not torch.allclose(logits(merged, inputs), expected, atol=0.01)
    detach_vision_remember(merged)
    assert not [name for name, _ in merged.named_modules() if "vision_remember" in name]


def test_unloading_drops_lora_and_keeps_the_blocks_that_peft_trained() -> None:
    model = host()
    handle = attach_vision_remember(model, LAYERS)
    randomise(handle)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = lora(model, modules_to_save=OURS)
    train(wrapped, batch(model))
    trained = wrapped.state_dict()
    prefix = "base_model.model.model.language_model.layers.1.vision_remember.modules_to_save.default."
    unloaded = wrapped.unload()
    assert unloaded.state_dict().keys() == before.keys()
    changed = {name for name, tensor in unloaded.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if any(part in name for part in OURS)}
    for name, tensor in unloaded.model.language_model.layers[1].vision_remember.state_dict().items():
        assert torch.equal(tensor, trained[prefix + name])


def test_disabling_the_adapter_disables_the_blocks_that_peft_trained() -> None:
    model, _ = built("attach, then LoRA with the blocks")
    inputs = batch(model.get_base_model())
    with model.disable_adapter():
        before = logits(model, inputs)
    train(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), before)
    assert not torch.allclose(logits(model, inputs), before, atol=0.01)


def test_peft_saves_and_loads_the_blocks_it_trains(tmp_path: Path) -> None:
    model, _ = built("attach, then LoRA with the blocks")
    inputs = batch(model.get_base_model())
    train(model, inputs)
    model.save_pretrained(tmp_path)
    twin = host()
    attach_vision_remember(twin, LAYERS)
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("order", ORDERS)
def test_adapter_folders_of_both_libraries_together_bring_everything_back(order: str, tmp_path: Path) -> None:
    model, handle = built(order)
    handle.module.requires_grad_(True)
    inputs = batch(model.get_base_model())
    train(model, inputs)
    handle.save_pretrained(tmp_path / "blocks")
    model.save_pretrained(tmp_path / "lora")
    twin = build_llava()
    if order == "attach, then LoRA with the blocks":
        compress_projector(twin, None, "adaptive_avg_pool", ratio=4)
        attach_vision_remember(twin, LAYERS)
    else:
        load_vision_remember(twin, tmp_path / "blocks", llava_processor("clip", 32, 4))
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path / "lora").eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
