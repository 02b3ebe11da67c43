"""Frozen dataclasses whose values come from files: each is held against its annotation."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_fields(instance: Any) -> None:
    """Raises ValueError for the first field of a dataclass whose value its annotation does not allow."""
    for name, hint in get_type_hints(type(instance)).items():
        if name in instance.__dataclass_fields__ and not _fits(getattr(instance, name), hint):
            expected = str(hint).replace("typing.", "") if get_origin(hint) else hint.__name__
            raise ValueError(f"{type(instance).__name__}.{name}={getattr(instance, name)!r}: expected {expected}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1] is ...:
            return all(_fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) and (dataclasses.is_dataclass(hint) or hint in (str, bool, type(None)))
