"""Plug-ins of axolotl and ms-swift. Both pin other versions than ours: stand-ins have what the plug-ins use of them."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.test_trainer import host, trainer
from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.trainer import ADAPTER_FOLDER, VisionRememberCallback


def imported(name: str, monkeypatch: pytest.MonkeyPatch, stand_ins: dict[str, dict[str, Any]]) -> Any:
    for path, names in stand_ins.items():
        module = types.ModuleType(path)
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def checked(callback: VisionRememberCallback, model: Any, folder: Path) -> None:
    """A Trainer with the callback trains the blocks and saves an adapter in its checkpoint."""
    before = {name: p.clone() for name, p in model.named_parameters() if "vision_remember" in name}
    trainer(model, folder, callback, max_steps=2, save_steps=2).train()
    after = dict(model.named_parameters())
    blocks = [name for name in after if "vision_remember" in name]
    assert blocks
    assert not before or any(not torch.equal(after[name], before[name]) for name in before)
    assert (folder / "checkpoint-2" / ADAPTER_FOLDER / "adapter_model.safetensors").is_file()
    assert not any(
        p.requires_grad for name, p in after.items() if "language_model.layers" in name and name not in blocks
    )


def test_axolotl_attaches_before_lora_and_saves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = {"axolotl": {}, "axolotl.integrations": {}, "axolotl.integrations.base": {"BasePlugin": object}}
    module = imported("vision_remember.adapters.axolotl", monkeypatch, base)
    plugin = module.VisionRememberPlugin()
    name, _, arguments = plugin.get_input_args().rpartition(".")
    fields = getattr(sys.modules[name], arguments)(vision_remember={"layers": [1, 3], "phase": 1})
    model = host()
    plugin.post_model_build(fields, model)
    attachment = find_attachment(model)
    assert attachment is not None
    assert attachment.config.layers == (1, 3)
    (callback,) = plugin.add_callbacks_pre_trainer(fields, model)
    checked(callback, model, tmp_path)


def test_axolotl_refuses_what_attach_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"axolotl": {}, "axolotl.integrations": {}, "axolotl.integrations.base": {"BasePlugin": object}}
    plugin = imported("vision_remember.adapters.axolotl", monkeypatch, base).VisionRememberPlugin()
    with pytest.raises(ValueError, match="no field 'layer': did you mean 'layers'"):
        plugin.post_model_build(SimpleNamespace(vision_remember={"layer": [1]}), host())


def test_ms_swift_builds_the_callback_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table: dict[str, Any] = {}
    module = imported(
        "vision_remember.adapters.ms_swift", monkeypatch, {"swift": {}, "swift.callbacks": {"callbacks_map": table}}
    )
    module.register(layers=[1, 3], phase=1)
    assert list(table) == ["vision_remember"]
    checked(table["vision_remember"](SimpleNamespace(), SimpleNamespace()), host(), tmp_path)


@pytest.mark.parametrize(("name", "library"), [("axolotl", "axolotl"), ("ms_swift", "swift")])
def test_without_the_framework_the_import_says_so(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"vision_remember.adapters.{name}", raising=False)
    with pytest.raises(ImportError, match="which is missing"):
        importlib.import_module(f"vision_remember.adapters.{name}")
