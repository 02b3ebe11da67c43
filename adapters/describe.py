"""Describes a vision encoder that is in no table, by what its modules are."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from vision_remember.encoder import EncoderSpec

_LAYERS = ("layers", "layer", "blocks", "resblocks")
_QUERIES = ("q_proj", "query", "q", "wq", "to_q")
_KEYS = ("k_proj", "key", "k", "wk", "to_k")
_FUSED = ("qkv", "qkv_proj", "wqkv", "Wqkv", "query_key_value")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads", "config.num_attention_heads", "config.num_heads")
_MERGES = ("spatial_merge_size", "config.spatial_merge_size", "merge_size", "config.merge_size")
_SIZES = ("grid_thw", "image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes", "pixel_position_ids")
_IMAGES = ("config.image_size", "patch_embed.img_size", "timm_model.patch_embed.img_size", "image_size")
_PATCHES = ("patch_size", "config.patch_size")


def describe_encoder(encoder: nn.Module) -> list[EncoderSpec]:
    """Specs that an encoder may have, read off its modules and the arguments of its forward; likeliest first.

    There are several where images may have any size: these differ in the order of the cells, which no name tells, and
    have to be tried.

    Raises:
        ValueError: no list of blocks, or blocks that tell neither their width nor their norm.
    """
    layers = _layers(encoder)
    block: Any = next(encoder.get_submodule(layers).children())
    norm = next((name for name, module in block.named_children() if _is_norm(module)), None)
    width = norm or next((name for name, module in block.named_modules() if _is_norm(module)), None)
    if width is None:
        raise ValueError(f"{type(block).__name__}, a block of {type(encoder).__name__}, has no norm: {_advice()}")
    attention = _attention(block) if norm is not None else None
    described: dict[str, Any] = {
        "name": type(encoder).__name__,
        "classes": (type(encoder).__name__,),
        "layers": layers,
        "width": width,
        "image_size": next((path for path in _IMAGES if _has_numbers(encoder, path)), None),
        **({"norm": norm, **attention} if attention else {}),
    }
    orders = _orders(encoder)
    if not orders:
        patches = {"patch_embedding": _patch_embedding(encoder, layers)}
        orders = [{"order": "raster", **_prefix(encoder), **patches}]
        if any(isinstance(module, nn.Conv2d) for module in block.modules()):
            orders.insert(0, {"order": "channels_first"})
    return [EncoderSpec(**described, **order) for order in orders]


def conjectures(encoder: nn.Module) -> list[EncoderSpec]:
    """Specs that an encoder may have, likeliest first, and some that are rare: for those who can try them.

    Raises:
        ValueError: as :func:`describe_encoder`.
    """
    specs = describe_encoder(encoder)
    with_cls = [spec for spec in specs if spec.order == "raster" and (spec.prefix_tokens, spec.cls_token) == (1, 0)]
    return [*specs, *(replace(spec, prefix_tokens=0, cls_token=-1) for spec in with_cls)]


def _layers(encoder: nn.Module) -> str:
    lists = [
        (name.count("."), order, name)
        for order, (name, module) in enumerate(encoder.named_modules())
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and name.rpartition(".")[2] in _LAYERS
        and len(module) > 0
        and len({type(child) for child in module}) == 1
    ]
    if not lists:
        raise ValueError(f"{type(encoder).__name__} has no list of blocks ({', '.join(_LAYERS)}): {_advice()}")
    depth = min(lists)[0]
    # Of stages one after the other the last, whose features are the host's.
    return [name for level, _, name in lists if level == depth][-1]


def _attention(block: nn.Module) -> dict[str, str] | None:
    """Paths of the projections in a block; None if it has none that can be read."""
    names = block.named_children()
    name = next((name for name, part in names if "attention" in type(part).__name__.lower() or "attn" in name), None)
    if name is None:
        return None
    attention = block.get_submodule(name)
    if isinstance(attention, nn.MultiheadAttention):
        return {"fused": name, "num_heads": f"{name}.num_heads"} if attention._qkv_same_embed_dim else None
    linears = {path: module for path, module in attention.named_modules() if hasattr(module, "weight")}
    heads = next((path for path in _HEADS if _has_numbers(attention, path)), None)
    paths = {
        which: next((path for path in linears if path.rpartition(".")[2] in names), None)
        for which, names in (("query", _QUERIES), ("key", _KEYS), ("fused", _FUSED))
    }
    found = {which: f"{name}.{path}" for which, path in paths.items() if path is not None}
    if heads is None or not ("fused" in found or {"query", "key"} <= found.keys()):
        return None
    if "query" in found and _outputs(linears[paths["query"]]) != _outputs(linears[paths["key"] or ""]):
        return None  # fewer heads for keys than for queries
    return {**found, "num_heads": f"{name}.{heads}"}


def _orders(encoder: nn.Module) -> list[dict[str, Any]]:
    """The orders that an encoder for images of any size may have; none for one that takes images of one size."""
    arguments = inspect.signature(type(encoder).forward).parameters
    sizes = next((name for name in (*_SIZES, "image_sizes") if name in arguments), None)
    if sizes in ("spatial_shapes", "pixel_position_ids"):
        return [{"order": "padded", "sizes": sizes}]
    if sizes == "image_sizes":
        unit = next((path for path in _PATCHES if _has_numbers(encoder, path)), None)
        return [{"order": "packed", "sizes": sizes, "size_unit": unit}]
    if sizes is None:
        return []
    orders: list[dict[str, Any]] = []
    merge = next((path for path in _MERGES if _has_numbers(encoder, path)), 2)
    blocks = {"order": "blocks", "sizes": sizes, "merge": merge}
    if _has_numbers(encoder, "window_size") and _has_numbers(encoder, "patch_size"):
        orders.append({**blocks, "order": "windows", "window_size": "window_size", "patch_size": "patch_size"})
    prefix = {"prefix_tokens": _prefix(encoder)["prefix_tokens"]}
    return [{**order, **prefix} for order in (*orders, blocks, {"order": "packed", "sizes": sizes})]


def _prefix(encoder: nn.Module) -> dict[str, Any]:
    """How many tokens stand in front of the patches, by the parameters that become tokens."""
    tokens = {
        name.rpartition(".")[2]: parameter.shape[-2] if parameter.ndim > 1 else 1
        for name, parameter in encoder.named_parameters()
        if any(
            word in name.rpartition(".")[2]
            for word in ("cls_token", "class_embedding", "class_token", "register", "reg_token")
        )
    }
    has_cls = any("cls" in name or "class" in name for name in tokens)
    return {"prefix_tokens": sum(tokens.values()), "cls_token": 0 if has_cls else None}


def _patch_embedding(encoder: nn.Module, layers: str) -> str | None:
    """The convolution that cuts an image into patches, if there is one in front of the blocks."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith(f"{layers}.") and module.stride == module.kernel_size:
            return name
    return None


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm whose weight tells the width."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1


def _outputs(module: Any) -> int:
    return int(module.weight.shape[0])


def _has_numbers(root: Any, path: str) -> bool:
    for name in path.split("."):
        root = getattr(root, name, None)
    values: Iterable[Any] = root if isinstance(root, (list, tuple)) and root else [root]
    return all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)


def _advice() -> str:
    return (
        "describe it with an EncoderSpec and pass MultiLevelTap(encoder, spec=...) or "
        "attach_vision_remember(model, spec=MLLMSpec(encoder_spec=...))"
    )
