"""The Triton back-end around its kernels: when it is chosen, and what it says when it cannot run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.triton_cases import Case, tensors, with_gradients
from vision_remember import local_attention
from vision_remember.ops import triton_local_attention, triton_support

ROOT = Path(__file__).resolve().parents[1]
CASE = Case((3, 4), (5, 7), window=2)


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_kernels_pass_their_tests_in_the_interpreter() -> None:
    """The variable must be there before anything imports triton: another process."""
    pytest.importorskip("triton")
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


@pytest.mark.parametrize(
    ("preparation", "error", "message"),
    [
        ("", "ValueError", "backend='triton' with tensors on cpu: expected a CUDA device"),
        ("sys.modules['triton'] = None", "ImportError", "pip install 'vision-remember[triton]'"),
    ],
    ids=["no GPU", "no triton"],
)
def test_what_it_says_when_it_cannot_run(preparation: str, error: str, message: str) -> None:
    if not preparation:
        pytest.importorskip("triton")
    call = "local_attention(*[torch.ones(1, 1, 1, 4)] * 3, query_grid=(1, 1), key_grid=(1, 1), backend='triton')"
    result = run_python("-c", f"import sys, torch\n{preparation}\nfrom vision_remember import local_attention\n{call}")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(error)
    assert message in last


@pytest.mark.parametrize(
    ("found", "usable"),
    [("3.9.0", True), ("3.5rc1", True), ("3.4.9", False), ("2.1", False), ("main", True), (None, True)],
)
def test_triton_has_to_be_new_enough(found: str | None, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", "cc")
    monkeypatch.delitem(sys.modules, "vision_remember.ops.triton_kernels", raising=False)
    assert triton_support._is_usable() == usable
    if not usable:
        with pytest.raises(ImportError, match=rf"triton {found}: expected 3\.5 or newer"):
            triton_support.load_kernels(torch.device("cuda"))


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_triton_is_not_taken_where_it_cannot_build(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.9.0")
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert triton_support._is_usable()
    if missing == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        (tmp_path / "Python.h").unlink()
    assert not triton_support._is_usable()


def test_importing_it_does_not_import_triton() -> None:
    code = "import sys, vision_remember, vision_remember.ops.triton_local_attention; print('triton' in sys.modules)"
    assert run_python("-c", code).stdout.strip() == "False"


def test_on_a_cpu_auto_is_the_windowed_back_end() -> None:
    inputs = tensors(CASE, torch.float32)
    found = [with_gradients(local_attention, inputs, **CASE.grids, backend=backend) for backend in ("auto", "windowed")]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Recorded(TorchDispatchMode):
    """The operators that ran, new memory aside: on a GPU a launch each."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "empty" not in str(func):
            self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


def on_a_gpu(case: Case, dtype: torch.dtype, backend: str) -> tuple[Tensor, list[str]]:
    """The output on a GPU that is not there, and its operators. Autograd would ask that GPU for its streams."""
    shapes = {name: x.shape for name, x in tensors(case, dtype).items()}
    with FakeTensorMode(), torch.no_grad():
        inputs = {name: torch.empty(shape, dtype=dtype, device="cuda") for name, shape in shapes.items()}
        with Recorded() as recorded:
            output = local_attention(**inputs, **case.grids, backend=backend)
    return output, recorded.operators


@pytest.mark.parametrize("dtype", triton_local_attention.DTYPES)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_on_a_gpu_it_is_one_operator(dtype: torch.dtype, backend: str) -> None:
    pytest.importorskip("triton")
    output, operators = on_a_gpu(CASE, dtype, backend)
    assert operators == ["vision_remember.local_attention.default"]
    assert (output.dtype, output.device.type) == (dtype, "cuda")
    assert output.shape == tensors(CASE, dtype)["query"].shape


@pytest.fixture
def windowed(monkeypatch: pytest.MonkeyPatch) -> object:
    """What the windowed back-end returns instead of attending: a build without CUDA cannot index a tensor on a GPU."""
    token = object()
    monkeypatch.setattr(triton_local_attention, "windowed_local_attention", lambda *tensors, **rest: token)
    return token


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(CASE, torch.float64), (CASE._replace(dim=257), torch.float32), (CASE._replace(window=5), torch.float32)],
    ids=["float64", "wide heads", "large window"],
)
def test_on_a_gpu_auto_knows_what_the_kernels_are_not_for(case: Case, dtype: torch.dtype, windowed: object) -> None:
    assert on_a_gpu(case, dtype, "auto")[0] is windowed


def test_kernels_suit_no_transform() -> None:
    """They know none but vmap, and that as a loop."""
    pytest.importorskip("triton")
    found = []

    def asked(x: Tensor) -> Tensor:
        found.append(triton_local_attention.kernels_suit(torch.device("cuda"), torch.float16, 8, 1))
        return x.sum()

    for run in (asked, torch.func.grad(asked), torch.func.vmap(asked)):
        run(torch.ones(2))
    assert found == [True, False, False]


@pytest.mark.parametrize(
    ("importable", "new_enough"), [(False, True), (True, False)], ids=["triton is missing", "old GPU"]
)
def test_on_a_gpu_auto_does_without(
    importable: bool, new_enough: bool, windowed: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_support, "_USABLE", importable)
    monkeypatch.setattr(triton_support, "_is_new_enough", lambda device: new_enough)
    assert on_a_gpu(CASE, torch.float32, "auto")[0] is windowed
