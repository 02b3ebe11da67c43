"""Where Triton kernels run, and the module that holds them. Importing this module imports torch only."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch

_IMPORTABLE = importlib.util.find_spec("triton") is not None
_OLDEST_GPU = 8  # compute capability, its first number


def kernels_run(device: torch.device) -> bool:
    """Whether kernels run on a device: a GPU, under no transform of torch.func."""
    if device.type != "cuda" or not _IMPORTABLE:
        return False
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return not transformed and _is_new_enough(device)


def _is_new_enough(device: torch.device) -> bool:
    """Whether Triton generates code for this GPU. Without any GPU, tensors on one are fake, and all is possible."""
    if not torch.cuda.is_available():
        return True
    # of the ways to ask, torch.compile takes the answer of this one for a constant
    return torch.version.hip is None and torch.cuda.get_device_properties(device).major >= _OLDEST_GPU


def load_kernels(device: torch.device) -> ModuleType:
    """The module of kernels, imported on first use."""
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
