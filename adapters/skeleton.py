"""A model without its weights: enough of it to see where Vision Remember would go, in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_STD = 0.02


def build_skeleton(config: Any) -> Any:
    """A multimodal model of ``config`` whose language model is on the meta device; all else has small random weights.

    What image tokens come from can so be tried out, and the language model, most of the parameters, costs nothing.

    Args:
        config: of a multimodal model of transformers.

    Raises:
        ValueError: no multimodal model has such a configuration.
    """
    from transformers import AutoModelForImageTextToText

    with _parameters_on_meta(), torch.random.fork_rng():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    language = {id(parameter) for parameter in _language_parameters(model)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in language:
                    setattr(module, name, _random(parameter))
    return model


def give_storage(layer: nn.Module) -> None:
    """Puts a layer that is on the meta device on the CPU, with whatever is in memory there for weights."""
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def _language_parameters(model: Any) -> Iterator[nn.Parameter]:
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    # A model that names itself as its decoder keeps all weights: nothing tells what to leave out.
    if isinstance(decoder, nn.Module) and decoder is not model and decoder is not model.base_model:
        yield from decoder.parameters()
    if isinstance(head, nn.Module):
        yield from head.parameters()


def _random(parameter: nn.Parameter) -> nn.Parameter:
    """Ones for the scales of norms and zeros for biases would need names; small noise around one does for vectors."""
    noise = torch.randn(parameter.shape, dtype=parameter.dtype) * _STD
    return nn.Parameter(noise + 1 if parameter.ndim == 1 else noise, requires_grad=parameter.requires_grad)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, all parameters that modules get are on the meta device; buffers are real, as nothing fills them later."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
