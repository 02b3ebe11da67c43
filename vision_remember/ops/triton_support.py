"""Where Triton kernels run, and the module that holds them. Importing this module imports torch only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

from vision_remember.ops.transforms import is_transformed

_KERNELS = "vision_remember.ops.triton_kernels"
_OLDEST = (3, 5)  # of Triton, as in pyproject.toml
_OLDEST_GPU = 8  # compute capability, its first number


def _is_too_old() -> bool:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False  # a build of another name, of which nothing is known, or none
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) < _OLDEST


def _is_usable() -> bool:
    """Whether Triton is there, new enough, and able to build: for each kernel it compiles some C for Python."""
    if importlib.util.find_spec("triton") is None or _is_too_old():
        return False
    # Debian's own scheme has no headers, and Triton asks the general one instead.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_path("include", scheme), "Python.h")
    return headers.exists() and bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


_USABLE = _is_usable()  # asked once: torch.compile takes it for a constant


def kernels_run(device: torch.device) -> bool:
    """Whether kernels run on a device: a GPU, under no transform of torch.func."""
    return device.type == "cuda" and _USABLE and not is_transformed() and _is_new_enough(device)


def _is_new_enough(device: torch.device) -> bool:
    """Whether Triton generates code for this GPU. Without any GPU, tensors on one are fake, and all is possible."""
    if not torch.cuda.is_available():
        return True
    # of the ways to ask, torch.compile takes the answer of this one for a constant
    return torch.version.hip is None and torch.cuda.get_device_properties(device).major >= _OLDEST_GPU


def load_kernels(device: torch.device) -> ModuleType:
    """The module of kernels, imported on first use."""
    if _KERNELS not in sys.modules and _is_too_old():
        found, oldest = importlib.metadata.version("triton"), ".".join(map(str, _OLDEST))
        raise ImportError(f"backend='triton' with triton {found}: expected {oldest} or newer, or backend='windowed'")
    try:
        from vision_remember.ops import triton_kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            "backend='triton' needs triton: pip install 'vision-remember[triton]', or use backend='windowed'"
        ) from error
    if device.type != "cuda" and not triton_kernels.INTERPRETED:
        raise ValueError(
            f"backend='triton' with tensors on {device}: expected a CUDA device; or, to test without one, the variable"
            " TRITON_INTERPRET=1 before triton is imported; backend='windowed' runs anywhere"
        )
    return triton_kernels
