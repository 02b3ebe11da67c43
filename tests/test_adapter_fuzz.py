"""Adapter folders from strangers: whatever is in them, they load, or there is a clear error and nothing changed."""

from __future__ import annotations

import json
import random
import reprlib
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.fingerprint import Fingerprint
from tests.hosts import build_llava, image_side
from tests.processors import llava_processor
from tests.test_adapter_folder import CONFIG, WEIGHTS, trained
from vision_remember import load_vision_remember

CLEAR = (ValueError, FileNotFoundError)
fuzzed = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(name="good", scope="module")
def a_good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "adapter"
    torch.manual_seed(0)
    trained()[1].save_pretrained(folder)
    return folder


class Host:
    """One host for many attempts: each has to leave it as it was, so that all of them start from the same."""

    def __init__(self) -> None:
        self.model = build_llava()
        vision = self.model.config.vision_config
        self.processor = llava_processor("clip", image_side(self.model), vision.patch_size)
        self.before, self.counts = Fingerprint(self.model), dict(self.processor.__dict__)

    def try_to_load(self, folder: Path) -> Exception | None:
        """The error, a clear one; None if it loaded. The host is as before in either case."""
        error = None
        try:
            handle = load_vision_remember(self.model, folder, self.processor)
        except CLEAR as clear:
            error = clear
        else:
            handle.detach()
            if handle.compression is not None:
                handle.compression.restore()
        assert error is None or str(error).strip()
        self.before.check(self.model)
        assert dict(self.processor.__dict__) == self.counts
        return error


@pytest.fixture(name="host", scope="module")
def one_host() -> Host:
    return Host()


@pytest.fixture(name="folder")
def a_copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def test_the_good_folder_loads(host: Host, folder: Path) -> None:
    assert host.try_to_load(folder) is None


@fuzzed
@given(data=st.data())
def test_weights_cut_off_anywhere(host: Host, good: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "adapter", dirs_exist_ok=True))
    whole = (good / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert isinstance(host.try_to_load(folder), ValueError)


@fuzzed
@given(seed=st.integers(0, 2**32), count=st.integers(1, 30))
def test_header_bytes_overwritten(host: Host, good: Path, tmp_path: Path, seed: int, count: int) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "adapter", dirs_exist_ok=True))
    content, dice = bytearray((good / WEIGHTS).read_bytes()), random.Random(seed)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(count):
        content[dice.randrange(header)] = dice.randrange(256)
    (folder / WEIGHTS).write_bytes(bytes(content))
    host.try_to_load(folder)


@pytest.mark.parametrize("length", [2**63, 2**40, 100_000_001, 0], ids=["2^63", "2^40", "100 MB", "0"])
def test_a_header_that_claims_to_be_huge_or_empty(host: Host, folder: Path, length: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])
    assert isinstance(host.try_to_load(folder), ValueError)


def test_a_tensor_that_claims_to_be_huge(host: Host, folder: Path) -> None:
    header = json.dumps(
        {"vision_remember.1.norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    )
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(64))
    assert isinstance(host.try_to_load(folder), ValueError)


@pytest.mark.parametrize(
    "name",
    [
        *("../../etc/passwd", "/etc/passwd", "__class__", "vision_remember.1.__class__", "vision_remember.1.norm"),
        *(
            "vision_remember.1.norm.weight.data",
            "",
            ".",
            "projector.",
            "x" * 10_000,
            "vision_remember.1.norm.weigh\u0442",
        ),
    ],
)
def test_hostile_names_of_tensors(host: Host, folder: Path, name: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, name: torch.zeros(48)}, folder / WEIGHTS)
    error = host.try_to_load(folder)
    assert isinstance(error, ValueError)
    assert "unexpected" in str(error)


def test_tensors_that_changed_places(host: Host, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    one, other = "vision_remember.1.norm.weight", "vision_remember.1.interaction.vr_query.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, folder / WEIGHTS)
    assert "has shape" in str(host.try_to_load(folder))


def test_the_weights_of_another_adapter(host: Host, folder: Path, tmp_path: Path) -> None:
    trained(fusion="mbtf")[1].save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    assert "not saved together" in str(host.try_to_load(folder))
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)  # without its mark
    assert "do not fit" in str(host.try_to_load(folder))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_tensors_of_a_strange_dtype(host: Host, folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = "vision_remember.1.norm.weight"
    tensors[name] = torch.ones_like(tensors[name]).to(dtype)
    save_file(tensors, folder / WEIGHTS)
    error = host.try_to_load(folder)
    assert isinstance(error, ValueError)
    assert name in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def every_place(data: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of each value in nested dictionaries, inner ones included."""
    inner = (
        [place for name, value in data.items() for place in every_place(value, (*path, name))]
        if isinstance(data, dict)
        else []
    )
    return [path, *inner]


@settings(fuzzed, max_examples=300)
@given(data=st.data())
def test_any_value_of_the_description_replaced(host: Host, good: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "adapter", dirs_exist_ok=True))
    description = json.loads((good / CONFIG).read_text())
    path = data.draw(st.sampled_from(every_place(description)))
    value = data.draw(JSON)
    if not path:
        description = value
    else:
        parent = description
        for name in path[:-1]:
            parent = parent[name]
        parent[path[-1]] = value
    (folder / CONFIG).write_text(json.dumps(description))
    host.try_to_load(folder)


@fuzzed
@given(content=st.binary(max_size=64))
def test_a_description_of_any_bytes(host: Host, good: Path, tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "adapter", dirs_exist_ok=True))
    (folder / CONFIG).write_bytes(content)
    assert isinstance(host.try_to_load(folder), ValueError)


def test_a_description_nested_beyond_reason(host: Host, folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 100_000 + "]" * 100_000)
    assert isinstance(host.try_to_load(folder), ValueError)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "decoder"), "model.language_model.forward.__globals__"),
        (("spec", "decoder"), "__class__.__mro__"),
        (("spec", "encoder"), "model.language_model"),
        (("spec", "base"), "lm_head"),
        (("spec", "projector"), "model.nowhere"),
        (("spec", "projector"), ""),
        (("spec", "image_token_id"), "config.__dict__"),
        (("config", "layers"), [10**9]),
        (("config", "layers"), list(range(10_000))),
        (("config", "attn_dim"), 2**40),
        (("config", "num_heads"), 10**6),
        (("config", "cells"), [10**6, 10**6]),
        (("config", "window"), 10**9),
        (("projector", "ratio"), 10**12 + 1),
        (("projector", "out_grid"), [10**9, 10**9]),
        (("projector", "name"), "__import__('os').system('true')"),
        (("projector", "model"), "x"),
        (("projector", "spec"), {}),
    ],
    ids=reprlib.repr,
)
def test_hostile_values(host: Host, folder: Path, place: tuple[str, str], value: Any) -> None:
    description = json.loads((folder / CONFIG).read_text())
    description[place[0]][place[1]] = value
    (folder / CONFIG).write_text(json.dumps(description))
    assert isinstance(host.try_to_load(folder), CLEAR)


@pytest.mark.parametrize(
    "described",
    [
        {"name": "c_abstractor", "ratio": 4, "depth": 300},
        {"name": "c_abstractor", "ratio": 4, "mlp_depth": 300},
        {"name": "deformable_pool", "ratio": 4, "num_layers": 300},
        {"name": "honeybee_resampler", "ratio": 4, "hidden_dim": 10**6 + 3},
    ],
    ids=str,
)
def test_a_projector_of_more_layers_than_there_are_weights_is_not_built(
    host: Host, folder: Path, described: dict[str, Any]
) -> None:
    """It would take no memory, and hours if there were a million of them; as would a search for divisors of a prime."""
    description = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**description, "projector": described}))
    assert "more than the adapter's weights can be those of" in str(host.try_to_load(folder))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: (file.unlink(), file.symlink_to("nowhere")),
        lambda file: file.write_bytes(b""),
    ],
    ids=["a folder", "a link to nowhere", "empty"],
)
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_files_that_are_none(host: Host, folder: Path, name: str, break_it: Callable[[Path], Any]) -> None:
    break_it(folder / name)
    assert isinstance(host.try_to_load(folder), CLEAR)
