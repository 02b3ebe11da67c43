"""What interactions share: widths, projections, heads."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vision_remember.grid import check_count

_MAX_DEFAULT_WIDTH = 1024
_NARROWEST_DEFAULT_HEAD = 8
_LARGEST_SEARCHED = 1 << 16


def attention_width(attn_dim: int | Literal["features"] | None, query_dim: int, feature_dim: int) -> int:
    """The width that an ``attn_dim`` option means: "features" for C, None for D, at most 1024.

    Raises:
        ValueError: no positive whole number.
    """
    if attn_dim == "features":
        attn_dim = feature_dim
    elif attn_dim is None:
        attn_dim = min(query_dim, _MAX_DEFAULT_WIDTH)
    check_count("attn_dim", attn_dim)
    return attn_dim


def head_count(num_heads: int | None, width: int, wanted: int = 1) -> int:
    """``num_heads``; None for as many as leave at least 64 channels each (16 in an attention narrower than 512).

    Args:
        num_heads: heads, or None.
        width: of the attention.
        wanted: with None, no fewer heads than these where the width has room for them, with 8 channels or more each.

    Raises:
        ValueError: no positive whole number, or one that does not divide the width.
    """
    if num_heads is None:
        most = min(width, _LARGEST_SEARCHED)  # a file may ask for any width, and a search has to end
        widths = range(64 if width >= 512 else 16, most + 1)
        num_heads = width // next((channels for channels in widths if width % channels == 0), width)
        if num_heads < wanted:
            counts = range(wanted, min(width // _NARROWEST_DEFAULT_HEAD, _LARGEST_SEARCHED) + 1)
            num_heads = next((count for count in counts if width % count == 0), num_heads)
    check_count("num_heads", num_heads)
    if width % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide the attention width {width}")
    return num_heads


def projection(in_dim: int, out_dim: int, layers: int) -> nn.Linear | nn.Sequential:
    """One linear layer, or two with GELU between them."""
    if layers == 1:
        return nn.Linear(in_dim, out_dim)
    if layers == 2:
        return nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
    raise ValueError(f"{layers} layers in a projection: expected 1 or 2")


def zero_last(module: nn.Linear | nn.Sequential) -> None:
    """Sets weight and bias of a projection's last layer to zero, so that its output is exactly zero."""
    for parameter in list(module.parameters())[-2:]:
        nn.init.zeros_(parameter)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, width) -> (B, heads, N, d)."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)
