"""The training scripts: one recipe in three of them, the paper's phases, options that cannot be meant."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlavaNextForConditionalGeneration, TrainingArguments

from examples.train import __main__ as command
from examples.train import tiny, with_trainer, with_trl
from examples.train.loop import HEEDED, refuse_ignored
from examples.train.options import Options, parse
from examples.train.setup import prepare
from examples.train.tiny import build_tiny
from tests.training_runs import BACKENDS, CONFIGS, flags, run, same, weights
from vision_remember import load_vision_remember

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def no_dropout() -> Iterator[None]:
    """The scripts draw other random numbers, which only dropout would show."""

    def without(config: Any) -> Any:
        config.attention_dropout = 0.0
        return config

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiny, "language_config", lambda size, made=tiny.language_config: without(made(size)))
        yield


@pytest.fixture(name="losses", scope="module")
def of_the_loop_and_the_trainer(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[float]], list[Path]]:
    folders = [tmp_path_factory.mktemp(backend) for backend in ("loop", "trainer")]
    return [run(folder.name[:-1], folder) for folder in folders], folders


def test_the_loop_trains_as_the_trainer_does(losses: tuple[list[list[float]], list[Path]]) -> None:
    """Same order of the data, same mean over the answers of a step, same schedule."""
    (loop, trainer), folders = losses
    assert loop == pytest.approx(trainer, abs=2e-4)  # the Trainer rounds what it logs
    one, other = map(weights, folders)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-4, msg=name)


def test_what_is_left_is_a_model_and_its_adapter(losses: tuple[list[list[float]], list[Path]]) -> None:
    for folder in losses[1]:
        model = LlavaNextForConditionalGeneration.from_pretrained(folder / "model")
        fresh = build_tiny(4, layers=[1, 3])
        fresh.handle.detach()
        fresh.compression.restore()
        load_vision_remember(model, folder / "adapter", fresh.processor)
        found = model.state_dict()
        if folder == losses[1][0]:  # accelerate's checkpoint, which is written another way
            for name, tensor in load_file(folder / "checkpoint-6" / "model.safetensors").items():
                assert torch.equal(found[name], tensor)
        for name, tensor in load_file(folder / "adapter" / "adapter_model.safetensors").items():
            part, _, rest = name.partition(".")
            path = "model.multi_modal_projector." if part == "projector" else "model.language_model.layers."
            assert torch.equal(
                found[path + (rest if part == "projector" else rest.replace(".", f".{part}.", 1))], tensor
            )
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_trl_trains_as_the_trainer_does(losses: tuple[list[list[float]], list[Path]], tmp_path: Path) -> None:
    (_, trainer), (_, folder) = losses
    assert run("trl", tmp_path) == pytest.approx(trainer, abs=1e-5)
    one, other = weights(tmp_path), weights(folder)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_run_goes_on_with_batches_of_another_size_where_it_was(
    losses: tuple[list[list[float]], list[Path]], tmp_path: Path
) -> None:
    """As many conversations in a step, as on another number of GPUs: none twice, none left out."""
    (straight, _), (folder, _) = losses
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    other = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert run("loop", tmp_path, resume=True, **other) == pytest.approx(straight, abs=1e-4)
    expected = weights(folder)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_the_newest_checkpoint_stays_whatever_else_lies_there(
    losses: tuple[list[list[float]], list[Path]], tmp_path: Path
) -> None:
    """A run that goes on from a checkpoint elsewhere, in a folder that holds later steps of another."""
    for step in (8, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    named = losses[1][0] / "checkpoint-4"
    run("loop", tmp_path, resume_from_checkpoint=named, save_total_limit=2, save_steps=100)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-9"}


def test_the_loop_takes_shares_of_steps_and_no_limit_of_norms_as_the_trainer_does(tmp_path: Path) -> None:
    options = {"max_grad_norm": 0, "save_steps": 0.5, "logging_steps": 0.5, "save_total_limit": 3}
    found = [run(backend, tmp_path / backend, **options) for backend in ("loop", "trainer")]
    assert len(found[0]) == len(found[1]) == 2
    kept = [sorted(path.name for path in (tmp_path / name).glob("checkpoint-*")) for name in ("loop", "trainer")]
    assert kept[0] == kept[1] == ["checkpoint-3", "checkpoint-6"]
    one, other = (weights(tmp_path / backend) for backend in ("loop", "trainer"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_falls(backend: str, tmp_path: Path) -> None:
    losses = command.main(["--backend", backend, "--config", str(CONFIGS / "tiny.yaml"), "--output_dir", str(tmp_path)])
    assert sum(losses[-3:]) / 3 < 0.5 * losses[0]


def test_phase_two_starts_from_phase_one_with_tiles(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    options: dict[str, Any] = {"max_steps": 2, "save_steps": 2, "gradient_accumulation_steps": 1}
    plain = CONFIGS / "plain.jinja"
    run("loop", first, phase=1, tiles=0, chat_template=plain, learning_rate=0.05, **options)
    assert not (first / "model").exists()  # nothing of it changed
    run("loop", second, adapter=first / "adapter", learning_rate=0.0, **options)
    one, two = (weights_of_adapter(folder) for folder in (first, second))
    assert same(one, two)
    fresh, _ = prepared(tmp_path / "fresh")
    assert not fresh.handle.module["1"].interaction.vr_out.weight.any()
    assert one["vision_remember.1.interaction.vr_out.weight"].any()


def weights_of_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def prepared(folder: Path, **options: object) -> Any:
    chosen, args = parse(flags("loop", folder, **options)[2:], TrainingArguments)
    return prepare(chosen, args), args


def test_parts_have_learning_rates_of_their_own(tmp_path: Path) -> None:
    ready, _ = prepared(tmp_path, vr_lr=0.1, projector_lr=0.2, encoder_lr=0.3, train_encoder=True)
    kind, options = ready.optimizer
    rates = {group["name"]: group["lr"] for group in options["params"]}
    assert rates == {"Vision Remember": 0.1, "projector": 0.2, "encoder": 0.3, "language model": 3e-3}
    assert kind is torch.optim.AdamW


def test_a_global_batch_is_reached_by_accumulation(tmp_path: Path) -> None:
    assert prepared(tmp_path, global_batch=12)[1].gradient_accumulation_steps == 6
    with pytest.raises(ValueError, match="global_batch=13: expected a multiple of 2 per device times 1 processes"):
        prepared(tmp_path, global_batch=13)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("phase1.yaml", {"phase": 1, "tiles": 0, "global_batch": 256, "learning_rate": 1e-3}),
        ("phase2.yaml", {"phase": 2, "tiles": 4, "global_batch": 32, "learning_rate": 2e-5}),
    ],
)
def test_the_configurations_are_the_papers(file: str, expected: dict[str, Any], tmp_path: Path) -> None:
    words = ["--config", str(CONFIGS / file), "--vision", "v", "--language", "l", "--output_dir", str(tmp_path)]
    options, args = parse([*words, "--bf16", "false"], TrainingArguments)
    found = {name: getattr(options if hasattr(options, name) else args, name) for name in expected}
    assert found == expected
    assert (options.layers, options.ratio, options.projector) == ([1, 4], 4, "adaptive_avg_pool")
    assert (args.num_train_epochs, args.lr_scheduler_type, args.weight_decay) == (1, "cosine", 0.0)


def test_accelerates_configuration_names_the_layers_that_own_blocks() -> None:
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    layer = config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    assert config["fsdp_config"]["fsdp_version"] == 2
    assert {type(each).__name__ for each in build_tiny(layers=[1]).model.model.language_model.layers} == {layer}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"save_total_limit": 1}, "save_total_limit=1: the last good checkpoint"),
        ({"vision": "clip"}, "expected a model, or an encoder and a language model"),
        ({"phase": 3}, "phase=3: expected 1 or 2"),
        ({"tiles": 1}, "tiles=1: expected 0"),
        ({"preset": "papper"}, "did you mean 'paper'"),
        ({"projector": "avgpool"}, "unknown projector 'avgpool'"),
        ({"layers": 9}, r"layers=\[9\]: this decoder has layers 0..3"),
        ({"phase": 1, "encoder_lr": 1.0}, "rate of 1.0 for the encoder, which does not train"),
        ({"optim": "sgd"}, r"optim='sgd', .*: these scripts train by AdamW"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_errors(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, **change)


@pytest.mark.parametrize(
    "change", [{"gradient_checkpointing": True}, {"save_strategy": "epoch"}, {"logging_nan_inf_filter": False}], ids=str
)
def test_what_the_loop_would_ignore_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}.*: the plain loop has no such setting"):
        run("loop", tmp_path, **change)


def test_what_the_loop_heeds_are_settings_of_the_trainer() -> None:
    assert set(TrainingArguments.__dataclass_fields__) >= HEEDED


@pytest.mark.parametrize("file", ["tiny.yaml", "phase1.yaml", "phase2.yaml"])
def test_the_loop_takes_every_configuration(file: str, tmp_path: Path) -> None:
    model = [] if file == "tiny.yaml" else ["--model", "tiny"]
    words = ["--config", str(CONFIGS / file), *model, "--bf16", "false", "--output_dir", str(tmp_path)]
    refuse_ignored(parse(words, TrainingArguments)[1])


def test_the_scripts_have_the_same_settings_when_none_are_given(tmp_path: Path) -> None:
    words = ["--model", "tiny", "--output_dir", str(tmp_path)]
    seen = {}
    with pytest.MonkeyPatch.context() as patched:
        for module in (with_trainer, with_trl):
            patched.setattr(module, "prepare", lambda options, args: seen.update({type(args): args}) or _stop())
            with pytest.raises(KeyboardInterrupt):
                module.main(words)
    trainer, trl = seen.values()
    different = {
        name for name in TrainingArguments.__dataclass_fields__ if getattr(trainer, name) != getattr(trl, name)
    }
    assert different <= {"accelerator_config"}


def _stop() -> None:
    raise KeyboardInterrupt


def test_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("model: tiny\nlearning_rat: 1.0\n")
    with pytest.raises(ValueError, match="learning_rat"):
        parse(["--config", str(tmp_path / "wrong.yaml")], TrainingArguments)
    with pytest.raises(ValueError, match="unknown arguments --learning_rat 1: did you mean --learning_rate"):
        parse(["--model", "tiny", "--learning_rat", "1"], TrainingArguments)
    with pytest.raises(FileNotFoundError, match=r"--config nowhere\.yaml: no such file"):
        parse(["--config", "nowhere.yaml"], TrainingArguments)


@pytest.mark.parametrize("traceback", [False, True])
def test_a_mistake_is_one_line(traceback: bool, tmp_path: Path) -> None:
    """And the whole story on request, as for `vision-remember`."""
    words = ["--backend", "loop", "--model", "tinny", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"VISION_REMEMBER_TRACEBACK": "1"} if traceback else {})}
    run = subprocess.run(
        [sys.executable, "-m", "examples.train", *words], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == (1 if traceback else 2)
    assert "model=tinny: not 'tiny', and neither a folder nor a repository id (owner/name)" in run.stderr
    assert ("Traceback" in run.stderr) == traceback


def test_errors_of_others_keep_their_traceback() -> None:
    def caught(code: str) -> ValueError:
        with pytest.raises(ValueError, match=r"int|--config") as info:
            exec(code, {"__name__": "somebody.else", "parse": parse, "kind": TrainingArguments})
        return info.value

    assert not command.told(caught("int('x')"))
    assert command.told(caught("parse(['--model', 'tiny', '--config'], kind)"))


def test_a_file_that_is_no_yaml_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("layers: [1\n")
    with pytest.raises(ValueError, match=r"--config .*wrong.yaml: this is no YAML"):
        parse(["--config", str(tmp_path / "wrong.yaml")], TrainingArguments)
    with pytest.raises(ValueError, match="--config: expected a YAML file behind it"):
        parse(["--model", "tiny", "--config"], TrainingArguments)


def test_a_template_that_marks_no_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="does not mark the answers by"):
        prepared(tmp_path, chat_template=tmp_path / "template.jinja")


def test_bad_rows_stop_a_run_or_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
    rows: list[dict[str, Any]] = [{"conversations": turns}] * 4
    rows[2] = {"image": "gone.png", "conversations": turns}
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"line 3, row 3"):
        prepared(tmp_path, data=data)
    assert len(prepared(tmp_path, data=data, bad_rows="skip")[0].conversations) == 3
    assert "3 conversations, 1 skipped" in capsys.readouterr().out


def test_every_option_has_a_help_text() -> None:
    fields = Options.__dataclass_fields__.values()
    assert all(field.metadata.get("help") for field in fields)


def test_a_llava_in_a_folder_is_compressed_and_attached_to(tmp_path: Path) -> None:
    base = build_tiny(4, layers=[1])
    base.handle.detach()
    base.compression.restore()
    base.model.save_pretrained(tmp_path / "base")
    base.processor.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"tiles=4: .*cuts images up as it does"):
        prepared(tmp_path, model=tmp_path / "base")
    ready, _ = prepared(tmp_path, model=tmp_path / "base", tiles=0)
    assert type(ready.model) is LlavaNextForConditionalGeneration
    assert ready.handle.config.layers == (1, 3)
    assert ready.processor.patch_size == 2 * tiny.PATCH
    embeddings = ready.model.get_input_embeddings().weight
    assert torch.equal(embeddings, base.model.get_input_embeddings().weight)


def test_the_template_of_a_yaml_file_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--config examples/configs/phase1.yaml` works from any directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    given = ["--config", str(CONFIGS / "phase1.yaml"), "--model", "tiny"]
    options, _ = parse(given, TrainingArguments)
    assert options.chat_template == str(CONFIGS / "plain.jinja")
    (tmp_path / "plain.jinja").touch()  # the working directory comes first
    assert parse(given, TrainingArguments)[0].chat_template == "plain.jinja"
    with pytest.raises(FileNotFoundError, match=r"chat_template=gone.jinja: no file gone.jinja and no file .*configs"):
        parse([*given, "--chat_template", "gone.jinja"], TrainingArguments)
