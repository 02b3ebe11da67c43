"""The Trainers of transformers and TRL: they train the blocks, save adapters, and resume exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers as hf
import trl
from PIL import Image
from transformers.trainer_utils import load_sharded_checkpoint

from tests.fingerprint import structure
from tests.hosts import batch, build_llava, randomise
from tests.processors import llava_processor
from vision_remember import attach_vision_remember, compress_projector, load_vision_remember
from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.load import restore_vision_remember
from vision_remember.adapters.resolve import unwrapped
from vision_remember.adapters.trainer import ADAPTER_FOLDER, VisionRememberCallback

# PEFT asks for names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

LAYERS = [1, 3]
SAMPLES = 8


def host() -> Any:
    model = build_llava()
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    return model


def dataset(model: Any) -> list[dict[str, torch.Tensor]]:
    samples = [batch(model, (1,), seed=seed) for seed in range(SAMPLES)]
    return [{name: tensor[0] for name, tensor in sample.items()} for sample in samples]


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    inputs = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return {**inputs, "labels": inputs["input_ids"]}


def trainer(model: Any, folder: Path, callback: VisionRememberCallback | None, **options: Any) -> hf.Trainer:
    arguments = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return hf.Trainer(
        model=model,
        args=hf.TrainingArguments(str(folder), **{**arguments, **options}),
        train_dataset=dataset(unwrapped(model)),
        eval_dataset=dataset(unwrapped(model))[:2],
        data_collator=collate,
        callbacks=[callback] if callback else [],
    )


def same(model: Any, other: Any) -> bool:
    state, others = model.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(state[name], others[name]) for name in state)


@pytest.fixture(name="straight", scope="module")
def trained_without_a_break(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model after four steps in one go, and the folder with its checkpoints."""
    folder, model = tmp_path_factory.mktemp("straight"), host()
    trainer(model, folder, VisionRememberCallback(LAYERS, phase=2)).train()
    return model, folder


def test_it_attaches_and_trains_what_the_phase_says(tmp_path: Path) -> None:
    model = host()
    callback = VisionRememberCallback(LAYERS, phase=1)
    runner = trainer(model, tmp_path, callback, max_steps=2, save_strategy="no")
    assert callback.handle.config.layers == (1, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runner.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("vision_remember" in name for name in moved)
    assert all("vision_remember" in name or "multi_modal_projector" in name for name in moved)


def test_detaching_takes_the_callbacks_hook_along(tmp_path: Path) -> None:
    """A detached host refuses no names that it would take without us."""
    model = host()
    callback = VisionRememberCallback(LAYERS)
    trainer(model, tmp_path, callback)
    unknown = {"nowhere": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="belong nowhere in this"):
        model.load_state_dict(unknown, strict=False)
    callback.handle.detach()
    assert model.load_state_dict(unknown, strict=False).unexpected_keys == ["nowhere"]


def test_a_resumed_run_ends_bit_for_bit_where_the_straight_one_does(straight: tuple[Any, Path], tmp_path: Path) -> None:
    expected, folder = straight
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")  # what a kill after step 3 leaves
    model = host()
    trainer(model, tmp_path, VisionRememberCallback(LAYERS, phase=2)).train(resume_from_checkpoint=True)
    assert same(model, expected)


def test_resuming_restores_nothing_without_the_callback(straight: tuple[Any, Path], tmp_path: Path) -> None:
    """Why the callback translates names. If this fails, transformers was mended and the hook can go."""
    expected, folder = straight
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    model = host()
    attach_vision_remember(model, LAYERS).set_phase(2)
    trainer(model, tmp_path, None).train(resume_from_checkpoint=True)
    assert not same(model, expected)


def test_checkpoints_in_several_files_are_restored(tmp_path: Path) -> None:
    """A Trainer writes large models so."""
    model, twin = host(), host()
    for each in (model, twin):
        trainer(each, tmp_path / "run", VisionRememberCallback(LAYERS))
    randomise(VisionRememberHandle(find_attachment(model)))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "files", max_shard_size="100KB")
    assert len(list((tmp_path / "files").glob("*.safetensors"))) > 2
    assert not same(twin, model)
    load_sharded_checkpoint(twin, str(tmp_path / "files"), strict=False)
    assert same(twin, model)


def test_a_checkpoint_is_a_base_and_an_adapter_folder(straight: tuple[Any, Path]) -> None:
    expected, folder = straight
    # The base as transformers loads it: it drops the blocks, and the adapter brings them back.
    model = hf.LlavaForConditionalGeneration.from_pretrained(folder / "checkpoint-4")
    load_vision_remember(model, folder / "checkpoint-4" / ADAPTER_FOLDER, llava_processor("clip", 32, 4))
    assert same(model, expected)


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path: Path) -> None:
    model = host()
    # The greatest loss is called the best, so that the last weights have to give way to the first checkpoint's.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    options = {"eval_strategy": "steps", "eval_steps": 2, **best}
    runner = trainer(model, tmp_path, VisionRememberCallback(LAYERS, phase=2), **options)
    runner.train()
    assert runner.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    first = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    load_vision_remember(first, tmp_path / "checkpoint-2" / ADAPTER_FOLDER, llava_processor("clip", 32, 4))
    assert same(model, first)


def test_an_attached_model_is_taken_as_it_is(tmp_path: Path) -> None:
    model = host()
    randomise(attach_vision_remember(model, [2]))
    callback = VisionRememberCallback()
    with pytest.raises(RuntimeError, match="no Trainer was built"):
        _ = callback.handle
    trainer(model, tmp_path, callback)
    assert callback.handle.config.layers == (2,)
    with pytest.raises(ValueError, match=r"attached to this LlavaForConditionalGeneration already, so .*\[1, 3\]"):
        trainer(model, tmp_path, VisionRememberCallback(LAYERS))


def resume(folder: Path, layers: list[int], **options: Any) -> None:
    trainer(host(), folder, VisionRememberCallback(layers, phase=2), **options).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_does_not_fit_is_refused(straight: tuple[Any, Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(straight[1] / "checkpoint-2", checkpoint)
    with pytest.raises(RuntimeError, match=r"8 tensors belong nowhere in this Llava.*layers\.3\.vision_remember"):
        resume(tmp_path, [1, 2])
    shutil.rmtree(checkpoint / ADAPTER_FOLDER)
    with pytest.raises(ValueError, match="written without VisionRememberCallback"):
        resume(tmp_path, LAYERS)


def test_a_model_that_was_made_anew_for_training_is_refused(tmp_path: Path) -> None:
    """It would train without blocks, and its checkpoints would hold those of the model that it replaced."""
    options = {"max_steps": 1, "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True}
    runner = hf.Trainer(
        model_init=host,
        args=hf.TrainingArguments(str(tmp_path), **options),
        train_dataset=dataset(host()),
        data_collator=collate,
        callbacks=[VisionRememberCallback(LAYERS)],
    )
    with pytest.raises(ValueError, match="trains another model than the one that has Vision Remember: model_init"):
        runner.train()


def test_a_checkpoint_of_another_ratio_is_refused(tmp_path: Path) -> None:
    """Its weights have the same shapes."""

    def attached(ratio: int) -> tuple[Any, VisionRememberHandle]:
        model = build_llava()
        compress_projector(model, None, "adaptive_avg_pool", ratio=ratio)
        return model, attach_vision_remember(model, LAYERS, interaction="global")

    attached(4)[1].save_pretrained(tmp_path / "adapter")
    model, handle = attached(16)
    randomise(handle)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has the projector .*'ratio': 4.*, but the model has .*'ratio': 16"):
        restore_vision_remember(model, tmp_path / "adapter")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_from_elsewhere_has_to_be_named(straight: tuple[Any, Path], tmp_path: Path) -> None:
    expected, folder = straight
    elsewhere = str(folder / "checkpoint-2")
    callback = VisionRememberCallback(LAYERS, phase=2)
    with pytest.raises(ValueError, match=r"resumed at step 2, but not from .*resume_from_checkpoint="):
        trainer(host(), tmp_path, callback).train(resume_from_checkpoint=elsewhere)
    model = host()
    runner = trainer(model, tmp_path, VisionRememberCallback(LAYERS, phase=2), resume_from_checkpoint=elsewhere)
    runner.train(resume_from_checkpoint=elsewhere)
    assert same(model, expected)


@pytest.mark.parametrize("inside", [False, True], ids=["blocks beside PEFT", "blocks inside PEFT"])
def test_a_lora_run_resumes_exactly(inside: bool, tmp_path: Path) -> None:
    def build() -> Any:
        model = host()
        torch.manual_seed(0)
        options: dict[str, Any] = {"target_modules": r".*language_model.*\.(q|v)_proj"}
        if inside:
            attach_vision_remember(model, LAYERS)
            options["modules_to_save"] = ["vision_remember", "multi_modal_projector"]
        return peft.get_peft_model(model, peft.LoraConfig(r=2, **options))

    def callback() -> VisionRememberCallback:
        return VisionRememberCallback() if inside else VisionRememberCallback(LAYERS)

    expected = build()
    trainer(expected, tmp_path, callback()).train()
    fresh = attached_state(build(), callback(), tmp_path)
    moved = {n for n, t in expected.state_dict().items() if not torch.equal(t, fresh[n])}
    assert any("lora_A" in name for name in moved)
    assert any("vision_remember" in name for name in moved)
    model = build()
    trainer(model, tmp_path, callback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(model, expected)


def attached_state(model: Any, callback: VisionRememberCallback, folder: Path) -> dict[str, torch.Tensor]:
    trainer(model, folder, callback)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_phases_are_not_for_peft_models(tmp_path: Path) -> None:
    model = peft.get_peft_model(host(), peft.LoraConfig(target_modules=r".*language_model.*\.q_proj"))
    with pytest.raises(ValueError, match="PEFT chooses what trains"):
        trainer(model, tmp_path, VisionRememberCallback(LAYERS, phase=1))


def test_what_no_checkpoint_could_hold_is_refused_before_training(tmp_path: Path) -> None:
    model = host()
    attach_vision_remember(model, LAYERS)
    with pytest.raises(ValueError, match="which no adapter folder can hold"):
        trainer(
            peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")), tmp_path, VisionRememberCallback()
        )
    model = peft.get_peft_model(host(), peft.LoraConfig(target_modules="all-linear"))
    before = structure(model)
    with pytest.raises(ValueError, match=r"an adapter around projector.linear_1, which no adapter folder can hold"):
        trainer(model, tmp_path, VisionRememberCallback(LAYERS))
    assert structure(model) == before


CHAT = """{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}
{{ message.content[0].text }} w2 {% endgeneration %}{% else %}{% for part in message.content %}
{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endif %}{% endfor %}"""


def conversations(count: int) -> Any:
    """Pages of one grey each, and their number as the answer; the first conversation has no image."""
    rows = []
    for index in range(count):
        turns = [{"role": "user", "content": "w20 w21"}, {"role": "assistant", "content": f"w{30 + index}"}]
        rows.append({"messages": turns, "images": [Image.new("L", (32, 32), 20 * index).convert("RGB")] * (index > 0)})
    features = {
        "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        "images": [datasets.Image()],
    }
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_trl_trains_on_images(lora: bool, tmp_path: Path) -> None:
    model, processor = build_llava(), llava_processor("clip", 32, 4)
    processor.chat_template, processor.tokenizer.eos_token = CHAT, "w2"
    compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    callback = VisionRememberCallback(LAYERS, phase=None if lora else 1)
    runner = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            max_length=None,
            assistant_only_loss=True,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_steps=3,
        ),
        train_dataset=conversations(4),
        processing_class=processor,
        peft_config=peft.LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj") if lora else None,
        callbacks=[callback],
    )
    blocks = callback.handle.module
    before = {name: parameter.detach().clone() for name, parameter in blocks.named_parameters()}
    runner.train()
    losses = [entry["loss"] for entry in runner.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in blocks.named_parameters())
    twin = build_llava()
    load_vision_remember(twin, tmp_path / "checkpoint-6" / ADAPTER_FOLDER, llava_processor("clip", 32, 4))
    trained = dict(blocks.named_parameters())
    for layer in LAYERS:
        for name, parameter in twin.model.language_model.layers[layer].vision_remember.named_parameters():
            assert torch.equal(parameter, trained[f"{layer}.{name}"])


def test_the_callback_trains_the_encoder_when_told_to() -> None:
    model = host()
    VisionRememberCallback([1], phase=2, train_encoder=True).on_init_end(None, None, None, model=model)  # type: ignore[arg-type]
    assert all(parameter.requires_grad for parameter in model.model.vision_tower.parameters())


def test_an_encoder_without_a_phase_is_refused(tmp_path: Path) -> None:
    model = host()
    before = structure(model)
    with pytest.raises(ValueError, match="train_encoder=True without a phase would have no effect"):
        trainer(model, tmp_path, VisionRememberCallback(LAYERS, train_encoder=True))
    assert structure(model) == before
