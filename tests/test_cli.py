"""The command line on small saved models: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import NotASafetensorsRepoError
from PIL import Image
from typer.testing import CliRunner

from tests.hosts import batch, build_llava, image_side, randomise
from tests.processors import llava_processor
from vision_remember import adapters, attach_vision_remember, compress_projector
from vision_remember.adapters.cli import app
from vision_remember.adapters.cli_load import load_picture
from vision_remember.adapters.skeleton import build_skeleton
from vision_remember.adapters.weight_names import weight_names

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("inspect", "report", "export", "serve", "demo", "train", "bench", "eval")


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module", name="saved")
def saved_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``full`` with weights and processor, ``bare`` with a configuration alone, an ``adapter`` and a ``picture``."""
    root = tmp_path_factory.mktemp("saved")
    model = build_llava()
    processor = llava_processor("clip", image_side(model), model.config.vision_config.patch_size)
    processor.chat_template = "{% for message in messages %}<image> {{ message['content'][-1]['text'] }}{% endfor %}"
    model.save_pretrained(root / "full")
    processor.save_pretrained(root / "full")
    model.config.save_pretrained(root / "bare")
    compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    handle = attach_vision_remember(model, [1, 3], window=2)
    randomise(handle)
    handle.save_pretrained(root / "adapter")
    Image.new("RGB", (40, 32), "red").save(root / "picture.png")
    return {name: root / name for name in ("full", "bare", "adapter")} | {"picture": root / "picture.png"}


def test_every_command_has_a_page_with_examples() -> None:
    page = run("--help").output
    assert all(command in page for command in COMMANDS)
    for command in COMMANDS:
        page = run(command, "--help").output
        assert f"vision-remember {command}" in page
        assert "Examples:" in page


def test_help_loads_no_model_library() -> None:
    code = "import sys; from vision_remember.adapters.cli import app; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_names_of_the_adapters_are_found() -> None:
    assert not [name for name in adapters.__all__ if not hasattr(adapters, name)]


@pytest.mark.parametrize("which", ["full", "bare"])
def test_inspect_says_what_attaching_does(saved: dict[str, Path], which: str) -> None:
    handle = attach_vision_remember(build_llava(), [1, 3], window=2)
    found = json.loads(run("inspect", saved[which], "--layers", "1,3", "--set", "window=2", "--json").stdout)
    assert found["parameters"] == handle.parameter_counts()
    assert found["config"] == json.loads(handle.config.to_json())
    assert (found["feature_grid"], found["token_grid"]) == ([8, 8], [8, 8])
    table = run("inspect", saved[which], "--layers", "1,3", "--set", "window=2").stdout
    for name, value in handle.summary().items():
        assert any(line.startswith(name) and line.endswith(value) for line in table.splitlines())


def test_inspect_of_a_swapped_projector_and_of_an_adapter(saved: dict[str, Path]) -> None:
    options = ("--layers", "1,3", "--projector", "adaptive_avg_pool", "--ratio", "4", "--json")
    assert json.loads(run("inspect", saved["full"], *options).stdout)["token_grid"] == [4, 4]
    found = json.loads(run("inspect", saved["full"], "--adapter", saved["adapter"], "--json").stdout)
    assert (found["token_grid"], found["config"]["window"]) == ([4, 4], 2)


def test_a_skeleton_leaves_out_the_language_model_only() -> None:
    model = build_llava()
    generator_state = torch.random.get_rng_state()
    skeleton = build_skeleton(model.config)
    assert torch.equal(torch.random.get_rng_state(), generator_state)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in skeleton.named_parameters()} == shapes
    on_meta = {name for name, parameter in skeleton.named_parameters() if parameter.is_meta}
    assert on_meta == {name for name in shapes if "language_model" in name or "lm_head" in name}
    assert all(torch.isfinite(p).all() for p in skeleton.parameters() if not p.is_meta)
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in skeleton.named_buffers())
    assert not any(p.is_meta for p in torch.nn.Linear(2, 2).parameters())


def test_report_writes_the_page_and_the_numbers(saved: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ("report", saved["full"], saved["picture"], "-q", "w3 w4", "--out", page, "--max-new-tokens", "2")
    found = json.loads(run(*arguments, "--adapter", saved["adapter"], "--token", "2,3", "--json").stdout)
    assert page.read_text().startswith("<!doctype html>")
    assert (found["token"], found["page"]) == ([2, 3], str(page))
    assert found["change"] > 0
    assert "without:" in run(*arguments, "--layers", "1,3").stdout


def test_weights_of_blocks_inside_a_model_need_their_adapter(saved: dict[str, Path], tmp_path: Path) -> None:
    """transformers alone would leave them out; page, server and graphs would have fresh blocks in their place."""
    folder, page = shutil.copytree(saved["full"], tmp_path / "model"), tmp_path / "page.html"
    graphs = ("export", folder, "--format", "torch", "--out", tmp_path / "graphs")
    model = build_llava()
    attach_vision_remember(model, [1, 3])
    model.save_pretrained(folder)
    arguments = ("report", folder, saved["picture"], "--out", page, "--max-new-tokens", "1")
    assert "weights of Vision Remember" in run(*arguments, "--layers", "1,3", code=2).stderr
    assert not page.exists()
    assert "weights of Vision Remember" in run("serve", folder, "--layers", "1,3", code=2).stderr
    assert "weights of Vision Remember" in run(*graphs, "--layers", "1,3", code=2).stderr
    assert not (tmp_path / "graphs").exists()
    run(*arguments, "--adapter", saved["adapter"])
    assert page.exists()
    run(*graphs, "--adapter", saved["adapter"])


def test_names_of_weights_on_the_hub_come_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def header(self: Any, name: str, revision: str | None = None) -> SimpleNamespace:
        asked.append((name, revision))
        if name == "owner/private":
            raise NotASafetensorsRepoError(name)
        return SimpleNamespace(weight_map={"model.norm.weight": "model.safetensors"})

    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", header)
    assert weight_names("owner/model", "v1") == ["model.norm.weight"]
    assert weight_names("owner/private") == []
    assert asked == [("owner/model", "v1"), ("owner/private", None)]


@pytest.mark.parametrize(("form", "suffix"), [("onnx", "onnx"), ("torch", "pt2")])
def test_export_writes_graphs_that_agree(saved: dict[str, Path], tmp_path: Path, form: str, suffix: str) -> None:
    arguments = ("export", saved["full"], "--adapter", saved["adapter"], "--out", tmp_path, "--format", form)
    found = json.loads(run(*arguments, "--json").stdout)
    assert [block["layer"] for block in found["blocks"]] == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"layer_{n}.{suffix}" for n in (1, 3)]
    for block in found["blocks"]:
        assert block["passed"]
        assert not block["identity"]
        assert block["difference"] < 1e-4


def test_export_of_untrained_blocks_is_checked_with_random_weights(saved: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("export", saved["bare"], "--layers", "1", "--out", tmp_path, "--format", "torch")
    (block,) = json.loads(run(*arguments, "--json").stdout)["blocks"]
    assert block["identity"]
    assert 0 <= block["difference_with_random_weights"] < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["layer_1.pt2"]
    assert "--tolerance" in run(*arguments, "--tolerance", "-1", code=1).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "{bare}", "--layers", "1;3"), "--layers '1;3': expected whole numbers"),
        (("inspect", "{bare}", "--layers", "9"), "layers=[9]: this decoder has layers 0..3"),
        (("inspect", "{bare}", "--set", "window"), "expected FIELD=VALUE"),
        (("inspect", "{bare}", "--layers", "1", "--set", "windw=2"), "did you mean 'window'"),
        (("inspect", "{bare}", "--preset", "papr"), "did you mean 'paper'"),
        (
            ("inspect", "{bare}", "--adapter", "{adapter}", "--set", "window=2"),
            "--adapter brings its own configuration",
        ),
        (("inspect", "{bare}", "--adapter", "{adapter}", "--layers", "2"), "leave out --layers, --levels"),
        (("inspect", "{bare}", "--adapter", "{adapter}", "--layers", "1,4"), "leave out --layers, --levels"),
        (("inspect", "{bare}", "--adapter", "{adapter}", "--preset", "default"), "leave out --layers, --levels"),
        (("inspect", "{bare}", "--set", "layers=[1]"), "--set layers: expected --layers"),
        (("inspect", "{bare}", "--set", "levels=[1]"), "--set levels: expected --levels"),
        (("inspect", "{bare}", "--set", "preset=paper"), "--set preset: expected --preset"),
        (("inspect", "{bare}", "--set", "spec=llava"), "VisionRememberConfig has no such field"),
        (("inspect", "{bare}", "--ratio", "9"), "--ratio 9 without --projector"),
        (("inspect", "{bare}", "--ratio", "4"), "--ratio 4 without --projector"),
        (("inspect", "{bare}", "--adapter", "{adapter}", "--ratio", "4"), "leave out --layers, --levels"),
        (("inspect", "/nowhere"), "has no config.json"),
        (("inspect", "{bare}", "--adapter", "./nowhere"), "./nowhere is neither a folder nor a repository id"),
        (("report", "{full}", "{full}"), "is no picture that can be read"),
        (("report", "{bare}", "{picture}"), "has no processor"),
        (("report", "{full}", "{picture}", "--token", "1"), "expected a row and a column"),
        (("report", "{full}", "{picture}", "--out", "{full}"), "expected the name of a file, and this is a folder"),
        (("report", "{full}", "{picture}", "--dtype", "floaty"), "--dtype 'floaty'"),
        (("report", "{full}", "{picture}", "--device", "abacus"), "--device 'abacus': expected one that this machine"),
        (("export", "{bare}", "--format", "tflite"), "expected onnx or torch"),
        (("export", "{bare}", "--tokens", "12"), "expected rows x columns"),
        (("bench", "sped"), "expected 'speed' or 'proof'"),
        (("demo", "--sed", "1"), "unknown arguments --sed 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    saved: dict[str, Path], arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*(argument.format(**saved) for argument in arguments), code=2)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert message in last
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "file", "content", "message"),
    [
        ("inspect", "config.json", "null", "has a file that cannot be used, or is too large: TypeError"),
        ("inspect", "config.json", '{"model_type": "llava", "vision_config": 5}', "'vision_config' with value 5"),
        ("inspect", "config.json", '{"model_type": "llava", "vision_config": {"patch_size": 0}}', "ZeroDivisionError"),
        ("report", "config.json", '{"model_type": "llava", "vision_config": 5}', "'vision_config' with value 5"),
        ("report", "model.safetensors", "{}", "SafetensorError"),
        ("report", "processor_config.json", "null", "AttributeError"),
        ("export", "model.safetensors", "{}", "model.safetensors is damaged: SafetensorError"),
        ("export", "model.safetensors.index.json", "{}", "model.safetensors.index.json is damaged: KeyError"),
        ("serve", "model.safetensors", "{}", "model.safetensors is damaged: SafetensorError"),
        ("serve --adapter {adapter}", "model.safetensors", "{}", "SafetensorError"),
    ],
)
def test_a_damaged_file_of_a_model_is_a_message_too(
    saved: dict[str, Path], tmp_path: Path, command: str, file: str, content: str, message: str
) -> None:
    folder = shutil.copytree(saved["full"], tmp_path / "model")
    (folder / file).unlink(missing_ok=True)
    (folder / file).write_text(content)
    command, *adapter = command.format(**saved).split()
    files = {"report": [saved["picture"], "--out", tmp_path / "page.html"], "export": ["--out", tmp_path / "graphs"]}
    result = run(command, folder, *files.get(command, []), *(adapter or ["--layers", "1,3"]), code=2)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"Error: {folder}")
    assert message in last
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_damaged_adapter_is_a_message_too(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved["adapter"], tmp_path / "adapter")
    description = json.loads((folder / "adapter_config.json").read_text())
    description["spec"]["encoder_spec"]["image_size"] = "__class__"
    (folder / "adapter_config.json").write_text(json.dumps(description))
    assert (
        "the adapter's description fits no model" in run("inspect", saved["full"], "--adapter", folder, code=2).stderr
    )


def test_a_picture_is_read_the_way_up_that_its_camera_says(tmp_path: Path) -> None:
    """As transformers' own loader reads it: a phone writes pixels as they come and a note of how it was held."""
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("black", (0, 0, 20, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned to the right
    picture.save(tmp_path / "phone.png", exif=exif)
    read = load_picture(tmp_path / "phone.png")
    assert read.size == (20, 40)
    assert (read.getpixel((10, 5)), read.getpixel((10, 35))) == ((0, 0, 0), (255, 255, 255))


def test_sixteen_bits_of_grey_are_not_all_white(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "scan.png")
    assert np.array_equal(np.asarray(load_picture(tmp_path / "scan.png"))[..., 0], levels >> 8)


def test_a_picture_without_a_white_or_too_large_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("F", (4, 4)).save(tmp_path / "depth.tiff")
    with pytest.raises(ValueError, match=r"depth.tiff is no picture that can be read: mode F has no white"):
        load_picture(tmp_path / "depth.tiff")
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(ValueError, match=r"large.png is no picture that can be read: Image size \(1600 pixels\)"):
        load_picture(tmp_path / "large.png")


def test_a_name_that_is_neither_folder_nor_repository_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_connection(*_: Any, **__: Any) -> None:
        raise OSError("could not connect\nto the hub")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", no_connection)
    expected = "Error: nowhere is no folder here, and as a repository of the hub: could not connect\n"
    assert run("inspect", "nowhere", code=2).stderr == expected


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    for module in ("lmms_eval", "tqdm", "jinja2"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert "lmms_eval not installed: pip install 'vision-remember[eval]'" in run("eval", code=2).stderr
    assert "pip install 'vision-remember[demo]'" in run("demo", "--quick", code=2).stderr
    report = run("report", "model", "picture.png", code=2).stderr  # before the model is looked for
    assert "pip install 'vision-remember[demo]'" in report


def test_scripts_get_the_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for the folder that holds examples and benchmarks."""
    for path in ("examples/train", "benchmarks/speed"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path).parent.joinpath("__init__.py").touch()
        (tmp_path / path / "__init__.py").touch()
        (tmp_path / path / "__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit(7)")
    monkeypatch.setattr("vision_remember.adapters.cli_lab.lab_folder", lambda: tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("examples", "benchmarks")]:
        monkeypatch.delitem(sys.modules, name)
    before = list(sys.path), list(sys.argv)
    assert run("train", "a.yaml", "--lr", "1", code=7).stdout == "['a.yaml', '--lr', '1']\n"
    assert run("bench", "speed", "--suite", "quick", code=7).stdout == "['--suite', 'quick']\n"
    assert "has no benchmarks/proof: use the source repository" in run("bench", "proof", code=2).stderr
    assert (list(sys.path), list(sys.argv)) == before
    for name in [name for name in sys.modules if name.split(".")[0] in ("examples", "benchmarks")]:
        del sys.modules[name]  # the stand-ins; the real ones come back by themselves


def test_an_attached_model_is_what_a_server_answers_with(saved: dict[str, Path]) -> None:
    from transformers.cli.serving import model_manager

    from vision_remember.adapters.attachment import find_attachment
    from vision_remember.adapters.cli_common import Choices
    from vision_remember.adapters.serve import attaching

    choices = Choices.of(str(saved["adapter"]), None, None, None, None, None, None)
    plain = model_manager.ModelManager
    with attaching(choices):
        manager = model_manager.ModelManager(device="cpu", dtype="float32")
        model, _ = manager.load_model_and_processor(f"{saved['full']}@main")
        attachment = find_attachment(model)
        again, _ = manager.load_model_and_processor(f"{saved['full']}@main")
    assert model_manager.ModelManager is plain
    assert again is model
    assert attachment is find_attachment(again)
    assert attachment is not None
    assert attachment.config.window == 2
    with torch.no_grad():
        assert model(**batch(model)).logits.isfinite().all()  # type: ignore[operator]


def test_a_server_loads_no_model_but_its_own(saved: dict[str, Path], tmp_path: Path) -> None:
    """Whoever reaches its port could have it fetch any repository, and keep that in memory."""
    from transformers.cli.serving import model_manager

    from vision_remember.adapters.cli_common import Choices
    from vision_remember.adapters.serve import attaching

    other = shutil.copytree(saved["full"], tmp_path / "other")
    choices = Choices.of(str(saved["adapter"]), None, None, None, None, None, None)
    with attaching(choices):
        manager = model_manager.ModelManager(device="cpu", dtype="float32", force_model=str(saved["full"]))
        with pytest.raises(ValueError, match=rf"this server has .*full alone, and does not load {other}@main"):
            manager.load_model_and_processor(f"{other}@main")
        (own,) = manager.loaded_models
        assert own.removesuffix("@main") == str(saved["full"])  # transformers 5.24 gives folders no revision
        manager.load_model_and_processor(own)
        manager.shutdown()


def test_a_server_without_a_chat_template_does_not_start(saved: dict[str, Path], tmp_path: Path) -> None:
    """It would answer every question with "Internal Server Error"."""
    folder = shutil.copytree(saved["full"], tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    found = run("serve", folder, "--layers", "1,3", "--device", "cpu", code=2)
    assert "model has no chat template, by which a server makes prompts" in found.stderr
