"""The names by which a vision encoder is read."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from vision_remember.typed import check_fields

Order = Literal["raster", "channels_first", "packed", "blocks", "windows", "padded"]
"""How the cells of a batch stand in a hidden state; see :mod:`vision_remember.arrangement`."""


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Where things are in an encoder: dotted attribute paths, no code.

    Attributes:
        name: for messages and saved adapters.
        classes: class names (any in the encoder's method resolution order) that this spec describes.
        layers: the blocks, a ``ModuleList`` or ``Sequential`` whose items take and return hidden states.
        order: how cells stand in a hidden state.
        width: in a block, a norm as wide as the hidden state.
        prefix_tokens: for "raster" and the packed orders, tokens in front of a tile's first patch.
        cls_token: for "raster", the position of the CLS token; None if there is none.
        patch_embedding: for "raster", the convolution whose output (B, C, H, W) tells the grid; None if the grid is the
            square of the patches.
        sizes: for "packed", "blocks", "windows" and "padded", the argument of the encoder's forward that holds the
            images' sizes: (frames, rows, columns) or (rows, columns) of each, or the place (x, y) of each of its cells.
        size_unit: path of the side of a cell in the unit of ``sizes``; None where these count cells.
        merge: for "blocks" and "windows", the side of the blocks of cells that stand together, or its path.
        window_size: for "windows", the path of a window's side in pixels.
        patch_size: for "windows", the path of a cell's side in pixels.
        norm: in a block, the norm in front of the attention; None if there is no attention to read saliency from.
        query: in a block, the linear query projection.
        key: in a block, the linear key projection.
        fused: in a block, the linear projection of query, key and value in one, or an ``nn.MultiheadAttention``,
            instead of ``query`` and ``key``.
        num_heads: in a block, the number of attention heads.
        image_size: height and width of the images that the encoder is made for, a number or a pair; None if any fits.
        pooling_head: a SigLIP pooling head with ``probe`` and ``attention``, where there is one.
    """

    name: str
    classes: tuple[str, ...]
    layers: str
    order: Order = "raster"
    width: str | None = None
    prefix_tokens: int = 0
    cls_token: int | None = None
    patch_embedding: str | None = None
    sizes: str | None = None
    size_unit: str | None = None
    merge: str | int = 1
    window_size: str | None = None
    patch_size: str | None = None
    norm: str | None = None
    query: str | None = None
    key: str | None = None
    fused: str | None = None
    num_heads: str | None = None
    image_size: str | None = None
    pooling_head: str | None = None

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"order={self.order!r}: expected one of {', '.join(map(repr, get_args(Order)))}")
        if self.order in ("packed", "blocks", "windows", "padded") and self.sizes is None:
            raise ValueError(f"order={self.order!r} needs sizes, the argument that holds the images' sizes")
        check_fields(self)

    @property
    def has_attention(self) -> bool:
        """Whether a saliency map can be read from the blocks."""
        return self.norm is not None and (self.fused is not None or self.query is not None)


_PAPER_DEPTH = 24


def scale_levels(levels: Sequence[int], depth: int) -> tuple[int, ...]:
    """``hidden_states`` indices of a 24-block encoder, CLIP-L as the papers use it, for one of ``depth`` blocks."""
    return tuple(max(1, math.floor(level * depth / _PAPER_DEPTH + 0.5)) for level in levels)


def find(root: object, path: str) -> object:
    """``root.a.b`` for the path "a.b"; raises AttributeError."""
    return operator.attrgetter(path)(root)


def find_module(root: nn.Module, path: str, what: str) -> nn.Module:
    """The module at a dotted path; the empty path is ``root`` itself.

    Raises:
        ValueError: there is none; the message names the root, the path and ``what`` was looked for.
    """
    try:
        module = find(root, path) if path else root
    except AttributeError:
        module = None
    if not isinstance(module, nn.Module):
        children = ", ".join(name for name, _ in root.named_children())
        raise ValueError(f"{type(root).__name__} has no module {path!r} for its {what}; its children are: {children}")
    return module


def level_width(encoder: nn.Module, spec: EncoderSpec) -> int:
    """C, the width of a hidden state.

    Raises:
        ValueError: no norm of a block tells it.
    """
    block = next(find_module(encoder, spec.layers, "blocks").children())
    path = spec.width or spec.norm
    norm = find_module(block, path, "norm") if path else None
    weight = getattr(norm, "weight", None)
    if weight is None:
        raise ValueError(f"{type(block).__name__} has no norm {path!r} whose weight tells the width of the features")
    return int(weight.numel())


def projections(spec: EncoderSpec, block: nn.Module) -> list[nn.Module]:
    """The modules that a block's attention calls for its queries and keys; none where it reads their weights itself."""
    paths = [spec.query, spec.key] if spec.fused is None else [spec.fused]
    modules = [find_module(block, path or "", "projections") for path in paths]
    return [module for module in modules if not isinstance(module, nn.MultiheadAttention)]


def last_hook(module: nn.Module) -> object:
    """The last hook on a module's output, which sees what the caller gets; None if there is none."""
    return next(reversed(module._forward_hooks.values()), None)


def projected(
    spec: EncoderSpec, block: nn.Module, which: Literal["query", "key"], made: Mapping[nn.Module, Tensor]
) -> Tensor | None:
    """:func:`project` as the block did it itself.

    Args:
        spec: the encoder's; it has attention.
        block: one of its blocks.
        which: of the two.
        made: what its modules returned.

    Returns:
        None if the module that stands there now is not among them.
    """
    output = made.get(_maker(spec, block, which))
    return output if output is None or spec.fused is None else _part(output, which)


def project(spec: EncoderSpec, block: nn.Module, which: Literal["query", "key"], x: Tensor) -> Tensor:
    """(..., C) -> (..., C), queries or keys of a block's attention, heads not yet apart.

    Args:
        spec: the encoder's; it has attention.
        block: one of its blocks.
        which: of the two.
        x: what the block's attention is given.
    """
    module = _maker(spec, block, which)
    if isinstance(module, nn.MultiheadAttention):
        bias = None if module.in_proj_bias is None else _part(module.in_proj_bias, which)
        return nn.functional.linear(x, _part(module.in_proj_weight, which, dim=0), bias)
    # The whole projection, also where a part of it would do: its weight may be quantised, sharded or adapted.
    output: Tensor = module(x)
    return output if spec.fused is None else _part(output, which)


def _maker(spec: EncoderSpec, block: nn.Module, which: Literal["query", "key"]) -> nn.Module:
    """The module behind queries or keys."""
    path = spec.fused or (spec.query if which == "query" else spec.key)
    return find_module(block, path or "", which)


def _part(fused: Tensor, which: Literal["query", "key"], *, dim: int = -1) -> Tensor:
    """Queries or keys, or what makes them, of three parts in one."""
    return fused.chunk(3, dim=dim)[0 if which == "query" else 1]
