"""The image tokens that a host makes, and the places in its sequences where they go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
"""The arguments that may hold raw pixels, by modality."""


def image_tokens(output: Any) -> Any:
    """One (tokens, D) for each image, of what an encoding method returned."""
    if isinstance(output, (Tensor, list)):
        return output
    if isinstance(output, tuple):
        return output[-1]
    if output.pooler_output is not None:
        return output.pooler_output
    if getattr(output, "deepstack_features", None):
        # A host that adds its tokens in front of several layers has pairs of a layer and the tokens for it.
        _, images = output.deepstack_features[0]
        return images
    return output.last_hidden_state  # the host projects in its forward pass


def wants_tuple(base: nn.Module, return_dict: bool | None = None) -> bool:
    """Whether an encoding method of a transformers model gives a tuple, which does not say what its members are.

    Args:
        base: has the method.
        return_dict: the method's argument; None leaves it to the configuration.
    """
    if return_dict is None:
        return_dict = getattr(getattr(base, "config", None), "return_dict", True)
    return not return_dict


def text_positions(base: nn.Module, kwargs: dict[str, Any], token_ids: Iterable[int]) -> Tensor:
    """(B, S), where text stands: neither placeholders nor padding."""
    text = ~torch.stack([placeholders(base, kwargs, token) for token in token_ids]).any(0)
    mask = kwargs.get("attention_mask")
    # With a cache the mask covers what came before too.
    return text & mask[:, -text.shape[1] :].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else text


def placeholders(base: nn.Module, kwargs: dict[str, Any], token_id: int) -> Tensor:
    """(B, S), where the tokens of a modality go."""
    if kwargs.get("input_ids") is not None:
        at: Tensor = kwargs["input_ids"] == token_id
        return at
    embeds: Tensor = kwargs["inputs_embeds"]
    token = torch.full((), token_id, dtype=torch.long, device=embeds.device)
    return (embeds == base.get_input_embeddings()(token)).all(-1)  # type: ignore[operator]
