"""Names of other releases' weights, turned into ours."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def renamed(state_dict: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    """The same weights under our names; those of 1x1 convolutions become those of linear layers.

    Args:
        state_dict: the projector's part of a checkpoint, without the prefix of the model around it.
        modules: the name of each of the release's modules, and ours.

    Raises:
        ValueError: a weight that belongs to none of these modules.
    """
    ours = {}
    for key, tensor in state_dict.items():
        module, _, name = key.rpartition(".")
        if module not in modules:
            raise ValueError(
                f"unknown weight {key!r}: expected the projector's own, without the prefix of the model around them"
            )
        ours[f"{modules[module]}.{name}"] = tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor
    return ours


def taken(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    """The weight called ``name``.

    Raises:
        ValueError: there is none.
    """
    if name not in state_dict:
        found = ", ".join(map(repr, list(state_dict)[:3])) or "none"
        raise ValueError(
            f"no weight {name!r}: expected the projector's own, without the prefix of the model around them; "
            f"the first are {found}"
        )
    return state_dict[name]
