"""The public op: checks its arguments, then hands over to a back-end."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vision_remember.grid import Grid, check_count, check_grid, check_length
from vision_remember.ops.naive import naive_local_attention
from vision_remember.ops.regions import AxisRegions
from vision_remember.ops.triton_local_attention import auto_local_attention, triton_local_attention
from vision_remember.ops.windowed import windowed_local_attention
from vision_remember.registry import Registry

BACKENDS: Registry[Callable[..., Tensor]] = Registry(
    "back-end",
    {
        "auto": auto_local_attention,
        "naive": naive_local_attention,
        "triton": triton_local_attention,
        "windowed": windowed_local_attention,
    },
)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_grid: Grid,
    key_grid: Grid,
    key_levels: int = 1,
    window: int = 1,
    saliency: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-attention in which each block of queries sees only the cells under it (Vision Remember, section 4.2).

    The query grid is cut into ``window x window`` blocks from the top left; the last block of a row or column may be
    smaller. All queries of a block share one region: for a block that starts at query row ``i`` the key rows
    ``floor(i * H / h) .. ceil(min(i + window, h) * H / h) - 1``, columns likewise. With ``window=1`` this is adaptive
    average pooling's rule, so any pair of grids works; ``H = 2h`` is the paper's r = 2, four cells per token.

    Keys may come from several levels L of features on one grid: a region then holds its cells of every level, level
    after level, under a single softmax.

    Args:
        query: (B, heads, h*w, d), raster order.
        key: (B, heads, L*H*W, d), level after level, each in raster order.
        value: (B, heads, L*H*W, d_v), in the order of the keys.
        query_grid: (h, w).
        key_grid: (H, W).
        key_levels: how many levels the keys come from, L.
        window: side k of a block, in queries.
        saliency: (B, L*H*W), multiplies the values only, after the softmax has normalised: where it is small the output
            shrinks (eq. 3 applied as the paper describes).
        bias: added to the logits. (heads, k*k, L*cells), by the query's place in its block and the cell's place in its
            region, both row by row: only on grids that divide evenly. (heads, blocks, k*k, L*cells) on any grids, one
            per block, the cells counted in a frame as large as the largest region (see ``region_bias``).
        backend: "windowed" (fast anywhere), "triton" (kernels for a GPU; float32 and less), "naive" (the loop that
            defines the operation), or "auto": on a GPU the kernels where they suit, otherwise "windowed".

    Returns:
        (B, heads, h*w, d_v). Logits are scaled by ``1 / sqrt(d)``.

    Raises:
        ValueError: shapes, grids, dtypes or devices that do not fit together; the message names them.
    """
    _check_tensors(query, key, value, saliency, bias)
    check_grid("query_grid", query_grid)
    check_grid("key_grid", key_grid)
    check_length("query", query.shape[2], "query_grid", query_grid)
    check_count("key_levels", key_levels)
    if key.shape[2] % key_levels:
        raise ValueError(
            f"key holds {key.shape[2]} positions: expected key_levels={key_levels} rasters of equal length"
        )
    check_length("key" if key_levels == 1 else "a level of key", key.shape[2] // key_levels, "key_grid", key_grid)
    check_count("window", window)
    if bias is not None:
        _check_bias(bias, query.shape[1], query_grid, key_grid, key_levels, window)
    return BACKENDS[backend](
        query,
        key,
        value,
        query_grid=query_grid,
        key_grid=key_grid,
        key_levels=key_levels,
        window=window,
        saliency=saliency,
        bias=bias,
    )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, saliency: Tensor | None, bias: Tensor | None) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"{shapes}: expected (B, heads, positions, dim) each")
    if query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"{shapes}: batch and heads must agree, key and value need the same length, query and key the same dim"
        )
    expected = (key.shape[0], key.shape[2])
    if saliency is not None and tuple(saliency.shape) != expected:
        raise ValueError(f"saliency {tuple(saliency.shape)}: expected (B, H*W) = {expected}")
    given = {"query": query, "key": key, "value": value, "saliency": saliency, "bias": bias}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    if not query.is_floating_point():
        raise ValueError(f"query {query.dtype}: expected a floating dtype")
    if len({t.dtype for t in tensors.values()}) > 1:
        raise ValueError(f"dtypes differ: {', '.join(f'{n} {t.dtype}' for n, t in tensors.items())}")
    if len({t.device for t in tensors.values()}) > 1:
        raise ValueError(f"devices differ: {', '.join(f'{n} {t.device}' for n, t in tensors.items())}")


def _check_bias(bias: Tensor, heads: int, query_grid: Grid, key_grid: Grid, key_levels: int, window: int) -> None:
    rows, columns = (AxisRegions(*sides, window) for sides in zip(query_grid, key_grid, strict=True))
    cells = key_levels * rows.extent * columns.extent
    if bias.ndim == 3 and not (rows.even and columns.even):
        raise ValueError(
            f"a bias of shape (heads, k*k, cells) needs key_grid={key_grid} to be a multiple of query_grid={query_grid}"
            f" and window={window} to divide query_grid; give one bias per block instead (see region_bias)"
        )
    expected = (heads, window**2, cells) if bias.ndim == 3 else (heads, rows.blocks * columns.blocks, window**2, cells)
    if tuple(bias.shape) != expected:
        raise ValueError(f"bias {tuple(bias.shape)}: expected {expected}")
