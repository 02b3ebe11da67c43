"""Adapter folders: what is saved comes back; what is damaged is refused and changes nothing."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fingerprint import Fingerprint
from tests.hosts import PAIRINGS, batch, build_llava, image_side, randomise
from tests.processors import llava_processor
from vision_remember import attach_vision_remember, compress_projector, load_vision_remember

PROJECTOR = "multi_modal_projector"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def fresh(decoder: str = "qwen2", encoder: str = "clip") -> tuple[Any, Any]:
    model = build_llava(decoder, encoder)
    return model, llava_processor(encoder, image_side(model), model.config.vision_config.patch_size)


def trained(decoder: str = "qwen2", encoder: str = "clip", **options: Any) -> tuple[Any, Any]:
    """A compressed and attached model with weights of its own, and its handle."""
    model, processor = fresh(decoder, encoder)
    compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    handle = attach_vision_remember(model, [1, 3], **options)
    randomise(handle)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.add_(0.1)
    return model, handle


@pytest.fixture(name="folder")
def saved(tmp_path: Path) -> Path:
    trained()[1].save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(("decoder", "encoder"), PAIRINGS)
def test_a_saved_adapter_gives_the_same_logits(tmp_path: Path, decoder: str, encoder: str) -> None:
    model, handle = trained(decoder, encoder, window=2, position="learned", levels=[1, 4])
    handle.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    twin, processor = fresh(decoder, encoder)
    loaded = load_vision_remember(twin, tmp_path, processor)
    assert loaded.config == handle.config
    inputs = batch(model)
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    side = image_side(model)
    ids = processor(text=["<image>"], images=[torch.zeros(3, side, side, dtype=torch.uint8)])["input_ids"][0]
    assert len(ids) == 16


def test_an_adapter_without_a_projector_needs_no_processor(tmp_path: Path) -> None:
    model = build_llava()
    handle = attach_vision_remember(model, [1])
    randomise(handle)
    handle.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / WEIGHTS) if name.startswith("projector")]
    twin = build_llava()
    load_vision_remember(twin, str(tmp_path))
    inputs = batch(model)
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


def test_saving_again_replaces_the_files(folder: Path) -> None:
    handle = trained()[1]
    with torch.no_grad():
        handle.module["1"].norm.weight.fill_(7)
    handle.save_pretrained(folder)
    assert (load_file(folder / WEIGHTS)["vision_remember.1.norm.weight"] == 7).all()
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=str)
def test_a_write_that_fails_leaves_the_last_good_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def write_some(tensors: Any, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half of it")
        raise error

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    handle = trained()[1]
    with torch.no_grad():
        handle.module["1"].norm.weight.fill_(7)
    monkeypatch.setattr("vision_remember.adapters.checkpoint.save_file", write_some)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(type(error)):
            handle.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]  # no new folder, and nothing half written


def test_a_process_killed_while_it_saves_leaves_no_folder(tmp_path: Path) -> None:
    code = """
import os, signal, sys
import vision_remember.adapters.checkpoint as checkpoint
from tests.test_adapter_folder import trained
handle, write = trained()[1], checkpoint.save_file
def killed(tensors, file, **options):
    write(tensors, file, **options)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = killed
handle.save_pretrained(sys.argv[1])
"""
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "adapter")], cwd=root, check=False)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "adapter").exists()
    assert [path.name[:8] for path in tmp_path.iterdir()] == [".saving-"]


class Wrapper(torch.nn.Module):
    """What PEFT puts in place of a module that it trains a copy of."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = torch.nn.ModuleDict({"mine": copy.deepcopy(module)})
        self.active_adapter = "mine"

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.modules_to_save[self.active_adapter](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.original_module, name)


def test_what_peft_trains_is_what_is_saved(tmp_path: Path) -> None:
    model, handle = trained()
    layers = model.model.language_model.layers
    for parent, name in ((layers[1], "vision_remember"), (layers[3], "vision_remember"), (model.model, PROJECTOR)):
        parent._modules[name] = Wrapper(parent._modules[name])
        with torch.no_grad():
            for parameter in parent._modules[name].modules_to_save.parameters():
                parameter.add_(0.1)
    handle.save_pretrained(tmp_path)
    twin, processor = fresh()
    load_vision_remember(twin, tmp_path, processor)
    inputs = batch(model)
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


def test_the_card_says_how_to_load_the_adapter(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "load_vision_remember" in card
    assert "before decoder layers 1, 3" in card


def test_weights_come_in_the_dtype_of_the_host(folder: Path) -> None:
    model, processor = fresh()
    handle = load_vision_remember(model.to(torch.bfloat16), folder, processor)
    assert {p.dtype for p in handle.module.parameters()} == {torch.bfloat16}


def refused(folder: Path, message: str, error: type[Exception] = ValueError, host: Any = None) -> None:
    """Loading fails with this message and leaves model and processor as they were."""
    model, processor = host or fresh()
    before, counts = Fingerprint(model), dict(processor.__dict__)
    with pytest.raises(error, match=message):
        load_vision_remember(model, folder, processor)
    before.check(model)
    assert dict(processor.__dict__) == counts


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**data, **changes}))


def test_missing_extra_and_misshapen_tensors_are_all_named(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["vision_remember.1.norm.weight"]
        tensors["vision_remember.2.norm.weight"] = torch.zeros(48)
        tensors["projector.linear_1.bias"] = torch.zeros(5)

    edit_weights(folder, change)
    refused(
        folder,
        r"missing vision_remember.1.norm.weight; unexpected vision_remember.2.norm.weight; "
        r"projector.linear_1.bias has shape \(5,\), expected \(48,\)",
    )


@pytest.mark.parametrize("decoder", ["llama", "phi3"])
def test_an_adapter_of_another_base_is_refused(folder: Path, decoder: str) -> None:
    refused(folder, f"another base model; decoder: the adapter expects 'qwen2', .* '{decoder}'", host=fresh(decoder))


def test_an_adapter_of_another_encoder_is_refused(folder: Path) -> None:
    refused(
        folder,
        "encoder: the adapter expects 'clip_vision_model', this model has 'siglip_vision_model'",
        host=fresh("qwen2", "siglip"),
    )


def test_a_truncated_file_is_refused(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    for length in (len(data) - 10, 40, 4, 0):
        (folder / WEIGHTS).write_bytes(data[:length])
        refused(folder, "no readable safetensors file")


def test_a_pickle_is_never_opened(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / WEIGHTS)
    refused(folder, "no readable safetensors file")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, "never loaded")


def test_missing_files_and_folders(folder: Path) -> None:
    refused(folder / "nowhere", "neither a folder nor a repository id", FileNotFoundError)
    (folder / WEIGHTS).unlink()
    refused(folder, f"no {WEIGHTS}", FileNotFoundError)
    (folder / CONFIG).unlink()
    refused(folder, f"no {CONFIG}", FileNotFoundError)


def test_a_damaged_description_is_refused(folder: Path) -> None:
    good = (folder / CONFIG).read_text()
    edit_config(folder, format_version=2)
    refused(folder, "format_version 2; this release reads 1")
    edit_config(folder, format="other")
    refused(folder, "does not describe a vision-remember adapter")
    (folder / CONFIG).write_text(good)
    edit_config(folder, config={**json.loads(good)["config"], "windows": 1})
    refused(folder, "no field 'windows': did you mean 'window'")
    (folder / CONFIG).write_text(good)
    edit_config(folder, projector={"name": "magic", "ratio": 4})
    refused(folder, "unknown projector 'magic'")
    (folder / CONFIG).write_text(good[:-20])
    refused(folder, "is not JSON")
    (folder / CONFIG).write_text('{"format": "vision-remember", "format_version": 1}')
    refused(folder, "lacks")


def test_a_swapped_projector_needs_the_processor(folder: Path) -> None:
    model, _ = fresh()
    before = Fingerprint(model)
    with pytest.raises(ValueError, match="pass the model's processor"):
        load_vision_remember(model, folder)
    before.check(model)


def test_loading_onto_an_attached_model_is_refused(folder: Path) -> None:
    model, processor = fresh()
    attach_vision_remember(model, [1])
    refused(folder, "attached to this model already", RuntimeError, host=(model, processor))


@pytest.mark.parametrize("step", range(4))
def test_an_interrupted_save_leaves_the_last_adapter_or_says_so(
    folder: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before any of the renames, the folder is the old one; between them it is none; after them the new."""
    handle = trained(position="learned")[1]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace, left = os.replace, iter(range(step))

    def interrupted(source: Any, target: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    if step < 3:
        with pytest.raises(KeyboardInterrupt):
            handle.save_pretrained(folder)
    else:
        handle.save_pretrained(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]
    if step == 0:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    if 0 < step < 3:
        refused(folder, "were not saved together: a save was interrupted")
        return
    model, processor = fresh()
    loaded = load_vision_remember(model, folder, processor)
    assert loaded.config.position == ("learned" if step == 3 else "specialised")


def test_weights_in_pieces_are_not_saved(tmp_path: Path) -> None:
    """What shards a model may leave an empty tensor in a weight's place."""
    handle = trained()[1]
    handle.module["3"].norm.weight.data = torch.empty(0)
    with pytest.raises(
        ValueError, match=r"vision_remember\.3\.norm\.weight has shape \(0,\), but whole it has \(48,\)"
    ):
        handle.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_interrupt_before_anything_is_renamed_leaves_no_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = trained()[1]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vision_remember.adapters.checkpoint.save_file", fail)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(KeyboardInterrupt):
            handle.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
