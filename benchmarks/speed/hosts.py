"""Hosts of full size with random weights: CLIP-L/14 at 336 pixels and a Qwen2 decoder."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as hf
from torch import Tensor

IMAGE_TOKEN = 9

DECODERS: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 99,
    },
    "Qwen2-0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "Qwen2-1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "Qwen2-7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}


def encoder_config(small: bool, **changes: int) -> hf.CLIPVisionConfig:
    """CLIP-L/14 at 336 pixels, or a miniature of it."""
    sizes = {
        "hidden_size": 32 if small else 1024,
        "intermediate_size": 64 if small else 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 4 if small else 16,
        "image_size": 32 if small else 336,
        "patch_size": 4 if small else 14,
    }
    return hf.CLIPVisionConfig(**{**sizes, **changes})


def build(decoder: str, device: str, *, dtype: torch.dtype = torch.float32, layers: int | None = None) -> Any:
    """A LLaVA; ``layers`` cuts both towers down to so many."""
    sizes = dict(DECODERS[decoder])
    changes = {} if layers is None else {"num_hidden_layers": layers}
    config = hf.LlavaConfig(
        vision_config=encoder_config(decoder == "tiny", **changes),
        text_config=hf.Qwen2Config(**{**sizes, **changes}, tie_word_embeddings=True),
        image_token_id=IMAGE_TOKEN,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return hf.LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def twin(model: Any) -> Any:
    """A copy with modules of its own and the same weights, so that several candidates fit into memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def prompt(model: Any, tiles: int = 1, text: int = 50) -> dict[str, Tensor]:
    """So many images in one prompt, and text around them."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    h, w = getattr(model.model.multi_modal_projector, "out_grid", lambda grid: grid)((side, side))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, 90, (text,), generator=generator).tolist()
    ids = torch.tensor([words[: text // 2] + [IMAGE_TOKEN] * (tiles * h * w) + words[text // 2 :]])
    pixels = torch.randn(tiles, 3, vision.image_size, vision.image_size, generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: tensor.to(model.device) for name, tensor in given.items()}


def placeholder_mask(model: Any, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
    """What `LlavaModel.get_placeholder_mask` returns, without its comparison of counts, for which a host waits.

    A CUDA graph cannot hold that, with Vision Remember or without.
    """
    return (input_ids == model.config.image_token_id).unsqueeze(-1)
