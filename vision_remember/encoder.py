"""The names by which a vision encoder is read."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Where things are in an encoder: dotted attribute paths, no code.

    Attributes:
        name: for messages and saved adapters.
        classes: class names (any in the encoder's method resolution order) that this spec describes.
        layers: the blocks, a ``ModuleList`` whose items take and return (B, prefix + H*W, C).
        patch_embedding: the convolution whose output (B, C, H, W) tells the feature grid.
        prefix_tokens: tokens in front of the first patch.
        has_cls: whether the first prefix token is a CLS token.
        norm: in a block, the norm in front of the attention.
        query: in a block, the linear query projection.
        key: in a block, the linear key projection.
        num_heads: in a block, the number of attention heads.
        image_size: height and width of the images that the encoder is made for, a number or a pair.
        pooling_head: a SigLIP pooling head with ``probe`` and ``attention``, where there is one.
    """

    name: str
    classes: tuple[str, ...]
    layers: str
    patch_embedding: str
    prefix_tokens: int
    has_cls: bool
    norm: str
    query: str
    key: str
    num_heads: str
    image_size: str = "config.image_size"
    pooling_head: str | None = None


_PAPER_DEPTH = 24


def scale_levels(levels: Sequence[int], depth: int) -> tuple[int, ...]:
    """``hidden_states`` indices of a 24-block encoder, CLIP-L as the papers use it, for one of ``depth`` blocks."""
    return tuple(max(1, math.floor(level * depth / _PAPER_DEPTH + 0.5)) for level in levels)


def find(root: object, path: str) -> object:
    """``root.a.b`` for the path "a.b"; raises AttributeError."""
    return operator.attrgetter(path)(root)


def find_module(root: nn.Module, path: str, what: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        ValueError: there is none; the message names the root, the path and ``what`` was looked for.
    """
    try:
        module = find(root, path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Module):
        children = ", ".join(name for name, _ in root.named_children())
        raise ValueError(f"{type(root).__name__} has no module {path!r} for its {what}; its children are: {children}")
    return module
