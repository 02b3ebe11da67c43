"""What surrounds a block's attention as two operators, one Triton kernel each: from rows of the residual stream, back.

For inference: they have no gradients. ``gather_normalised`` is a gather and an RMS norm, ``write_update`` the output
projection, the residual addition and the scatter, without a copy of the stream besides the result.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from vision_remember.ops.triton_local_attention import load_kernels

MOST_ROWS = 1024
"""Rows that :func:`write_update` is for: beyond, a launch is little beside the product, where libraries do better."""

# Rows and columns of a product that one program makes: few rows, so that the tokens of one tile of an image make enough
# programs to fill a GPU.
_ROWS, _COLUMNS = 32, 64


@torch.library.custom_op("vision_remember::gather_normalised", mutates_args=())
def gather_normalised(hidden: Tensor, positions: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of some rows, in the dtype of its weight.

    Args:
        hidden: (rows, D).
        positions: (N,), which of them.
        weight: (D,), of the norm.
        eps: of the norm.

    Returns:
        (N, D).
    """
    kernels = _kernels(hidden.device)
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    count, width = len(positions), hidden.shape[1]
    out = weight.new_empty(count, width)
    if count:
        with torch.cuda.device_of(hidden):
            kernels.normalise_kernel[(count,)](
                *(hidden, positions, weight, out, hidden.stride(0), width, eps),
                **norm_options(width),
            )
    return out


@gather_normalised.register_fake
def _(hidden: Tensor, positions: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight.new_empty(positions.shape[0], hidden.shape[1])


@torch.library.custom_op("vision_remember::write_update", mutates_args=())
def write_update(hidden: Tensor, positions: Tensor, read: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows to which a linear layer's output is added, at some positions.

    Args:
        hidden: (rows, D).
        positions: (N,), ascending; a row for each entry of ``read``.
        read: (N, A).
        weight: (D, A), in the dtype of ``read``.
        bias: (D,), or None.

    Returns:
        (rows, D), new memory, contiguous.
    """
    kernels = _kernels(hidden.device)
    hidden, read = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, read))
    (rows, width), (count, inner) = hidden.shape, read.shape
    out = hidden.new_empty(rows, width)
    tiles = -(-count // _ROWS) + -(-rows // _ROWS)
    if rows:
        with torch.cuda.device_of(hidden):
            kernels.write_kernel[(tiles, -(-width // _COLUMNS))](
                *(hidden, positions, read, weight.contiguous(), bias, out, hidden.stride(0), read.stride(0)),
                *(rows, count, count.bit_length(), width, inner),
                HAS_BIAS=bias is not None,
                **write_options(read.dtype),
            )
    return out


@write_update.register_fake
def _(hidden: Tensor, positions: Tensor, read: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden.new_empty(hidden.shape)


def write_options(dtype: torch.dtype) -> dict[str, int | bool]:
    """What the product's kernel is compiled for. Compiled for sm_80 and sm_90 it spills nothing."""
    tile = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "INNER": 128 // dtype.itemsize}
    return {**tile, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def norm_options(width: int) -> dict[str, int | bool]:
    """What the norm's kernel is compiled for: a row in registers, at most 32 channels a thread."""
    padded = 1 << (width - 1).bit_length()
    return {"PADDED": padded, "num_warps": min(max(padded // 1024, 4), 32), "enable_fp_fusion": True}


def _kernels(device: torch.device) -> ModuleType:
    load_kernels(device)  # for its errors, where there is no triton or no GPU
    from vision_remember.ops import triton_row_kernels

    return triton_row_kernels
