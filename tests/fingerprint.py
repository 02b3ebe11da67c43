"""Everything about a model that attaching and detaching has to leave as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


class Fingerprint:
    """The state of a model, to be compared with its state later."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.structure = structure(model)

    def check(self, model: nn.Module) -> None:
        """Asserts that the model is bit for bit and hook for hook the same."""
        assert structure(model) == self.structure
        state = model.state_dict()
        assert list(state) == list(self.tensors)
        assert all(torch.equal(state[name], tensor) for name, tensor in self.tensors.items())


def structure(model: nn.Module) -> dict[str, Any]:
    """Module tree, classes, attributes, hooks, trainable flags and training modes."""
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "attributes": [(name, sorted(module.__dict__)) for name, module in model.named_modules()],
        "hooks": [
            (name, kind, list(getattr(module, kind).values()))
            for name, module in model.named_modules()
            for kind in _HOOKS
        ],
        "trainable": [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()],
    }
