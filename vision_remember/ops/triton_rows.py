"""What surrounds a block's attention as operators of one Triton kernel each: levels joined, rows found, read, written.

They have no gradients. ``join_normalised`` is a copy and a layer norm, ``find_places`` is ``torch.nonzero_static``,
which starts four kernels for it, ``gather_normalised`` a gather and an RMS norm,
``write_update`` the output projection, the residual addition and the scatter, without a copy of the stream besides the
result, ``add_update`` the last two of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from vision_remember.ops.transforms import has_tangent, is_transformed
from vision_remember.ops.triton_local_attention import DTYPES
from vision_remember.ops.triton_support import kernels_run, load_kernels

MOST_ROWS = 256
"""Rows that :func:`write_update` is for: beyond, a launch is little beside the product, where libraries do better."""

# Rows and columns of a product that one program makes: on an H200 among the fastest of 63 forms for one tile.
_ROWS, _COLUMNS = 64, 64
ADD_OPTIONS = {"ROWS": 1, "COLUMNS": 1024, "num_warps": 2, "enable_fp_fusion": True}
"""What the kernel of an addition alone is compiled for."""
# Levels that one launch joins, and the widest of them: a row in registers.
_MOST_LEVELS, _WIDEST_LEVEL = 4, 16384
FIND_OPTIONS = {"TILE": 2048, "num_warps": 8, "enable_fp_fusion": True}
"""What the search's kernel is compiled for."""
# Positions that one program goes through faster than several kernels do.
_LONGEST_SEARCH = 4 * FIND_OPTIONS["TILE"]


def can_find(mask: Tensor) -> bool:
    """Whether :func:`find_places` suits a mask: boolean, not too long, on a GPU that can run kernels."""
    return mask.dtype == torch.bool and mask.numel() <= _LONGEST_SEARCH and kernels_run(mask.device)


@torch.library.custom_op("vision_remember::find_places", mutates_args=())
def find_places(mask: Tensor, count: int) -> Tensor:
    """The places where a mask is true, in order.

    Args:
        mask: (length,), bool.
        count: how many.

    Returns:
        (count,), int64; -1 for those that there are not, and without those beyond.
    """
    kernels = _kernels(mask.device)
    out = mask.new_empty(count, dtype=torch.int64)
    if count:
        with torch.cuda.device_of(mask):
            kernels.find_kernel[(1,)](mask.contiguous(), out, len(mask), count, **FIND_OPTIONS)
    return out


@find_places.register_fake
def _(mask: Tensor, count: int) -> Tensor:
    return mask.new_empty(count, dtype=torch.int64)


def can_join(levels: Sequence[Tensor]) -> bool:
    """Whether :func:`join_normalised` does what separate operators would: levels alike, nothing to differentiate."""
    first = levels[0]
    learning = torch.is_grad_enabled() and any(level.requires_grad for level in levels)
    if learning or has_tangent(levels) or is_transformed() or torch.is_autocast_enabled(first.device.type):
        return False
    # One by one: a set of sizes would have compiled code fix those that may change.
    for level in levels[1:]:
        if (level.dtype, level.device) != (first.dtype, first.device):
            return False
        if level.shape != first.shape or level.stride() != first.stride():
            return False
    return first.dtype in DTYPES and first.stride(-1) == 1 and first.shape[-1] <= _WIDEST_LEVEL


@torch.library.custom_op(
    "vision_remember::join_normalised", mutates_args=(), schema="(Tensor[] levels, float eps) -> Tensor"
)
def join_normalised(levels: Sequence[Tensor], eps: float) -> Tensor:
    """Levels side by side, each normalised over its own channels (layer norm, without weights).

    Args:
        levels: L times (B, M, c), that :func:`can_join` takes.
        eps: of the norm.

    Returns:
        (B, M, L*c).
    """
    first = levels[0]
    images, cells, width = first.shape
    kernels = _kernels(first.device)
    out = first.new_empty(images, cells, len(levels) * width)
    if images * cells:
        with torch.cuda.device_of(first):
            for start in range(0, len(levels), _MOST_LEVELS):
                some = levels[start : start + _MOST_LEVELS]
                kernels.join_kernel[(images * cells, len(some))](
                    *(*some, *([first] * (_MOST_LEVELS - len(some))), out[..., start * width :]),
                    *(*first.stride()[:2], out.shape[-1], cells, width, eps),
                    **join_options(width),
                )
    return out


@join_normalised.register_fake
def _(levels: Sequence[Tensor], eps: float) -> Tensor:
    images, cells, width = levels[0].shape
    return levels[0].new_empty(images, cells, len(levels) * width)


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


@torch.library.custom_op("vision_remember::add_update", mutates_args=())
def add_update(hidden: Tensor, positions: Tensor, update: Tensor) -> Tensor:
    """Rows to which an update is added, at some positions.

    Args:
        hidden: (rows, D).
        positions: (N,), ascending; a row for each entry of ``update``.
        update: (N, D).

    Returns:
        (rows, D), new memory, contiguous.
    """
    kernels = _kernels(hidden.device)
    hidden, update = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, update))
    (rows, width), count = hidden.shape, len(update)
    out = hidden.new_empty(rows, width)
    if rows:
        with torch.cuda.device_of(hidden):
            kernels.add_kernel[(-(-rows // ADD_OPTIONS["ROWS"]), -(-width // ADD_OPTIONS["COLUMNS"]))](
                *(hidden, positions, update, out, hidden.stride(0), update.stride(0)),
                *(rows, count, count.bit_length(), width),
                **ADD_OPTIONS,
            )
    return out


@add_update.register_fake
def _(hidden: Tensor, positions: Tensor, update: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape)


def write_options(dtype: torch.dtype) -> dict[str, int | bool]:
    """What the product's kernel is compiled for. Compiled for sm_80 and sm_90 it spills nothing."""
    tile = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "INNER": 128 // dtype.itemsize}
    return {**tile, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def norm_options(width: int, fewest_warps: int = 4) -> dict[str, int | bool]:
    """What the norm's kernel is compiled for: a row in registers, at most 32 channels a thread."""
    padded = 1 << (width - 1).bit_length()
    return {"PADDED": padded, "num_warps": min(max(padded // 1024, fewest_warps), 32), "enable_fp_fusion": True}


def join_options(width: int) -> dict[str, int | bool]:
    """The same of the kernel that joins levels, whose rows are so many that one warp is enough for most."""
    return norm_options(width, fewest_warps=1)


def _kernels(device: torch.device) -> ModuleType:
    load_kernels(device)  # for its errors, where there is no triton or no GPU
    from vision_remember.ops import triton_row_kernels

    return triton_row_kernels
