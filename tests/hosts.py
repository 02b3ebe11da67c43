"""Small hosts with random weights, built from configurations: every decoder with every encoder."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers as hf
from packaging.version import Version

IMAGE_TOKEN, PAD_TOKEN, VOCABULARY = 90, 0, 99
CACHE = "cache" if Version(hf.__version__) >= Version("5.24") else "past_key_values"
"""The name of the cache in calls of a host and in what it returns."""

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD_TOKEN,
    "bos_token_id": 1,
    "eos_token_id": None,
}

DECODER_CONFIGS: dict[str, Any] = {
    "cohere": lambda: hf.CohereConfig(**_DECODER, logit_scale=1.0),
    "cohere2": lambda: hf.Cohere2Config(**_DECODER, logit_scale=1.0),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**_DECODER, head_dim=12, query_pre_attn_scalar=12),
    "gemma2": lambda: hf.Gemma2Config(**_DECODER, head_dim=12, query_pre_attn_scalar=12),
    "llama": lambda: hf.LlamaConfig(**_DECODER),
    "mistral": lambda: hf.MistralConfig(**_DECODER),
    "phi": lambda: hf.PhiConfig(**{**_DECODER, "num_key_value_heads": 4}),
    "phi3": lambda: hf.Phi3Config(**_DECODER),
    "qwen2": lambda: hf.Qwen2Config(**_DECODER),
    "qwen3": lambda: hf.Qwen3Config(**_DECODER, head_dim=12),
    "smollm3": lambda: hf.SmolLM3Config(**_DECODER),
}

_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}

ENCODER_CONFIGS: dict[str, Any] = {
    "clip": lambda: hf.CLIPVisionConfig(**_ENCODER),
    # 28 / 4 = 7 cells a side: a grid that the usual ratio does not divide, as in SigLIP's 27.
    "siglip": lambda: hf.SiglipVisionConfig(**{**_ENCODER, "image_size": 28}),
}

PAIRINGS = list(itertools.product(DECODER_CONFIGS, ENCODER_CONFIGS))


def build_llava(decoder: str = "qwen2", encoder: str = "clip", *, seed: int = 0) -> hf.LlavaForConditionalGeneration:
    """A LLaVA in eval mode; all weights are random but large enough that images matter to the logits."""
    torch.manual_seed(seed)
    config = hf.LlavaConfig(
        vision_config=ENCODER_CONFIGS[encoder](),
        text_config=DECODER_CONFIGS[decoder](),
        image_token_id=IMAGE_TOKEN,
        vision_feature_select_strategy="default" if encoder == "clip" else "full",
        vision_feature_layer=-2,
    )
    model = hf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def decoder_sizes() -> dict[str, Any]:
    """The sizes of the small decoders, for a configuration."""
    return dict(_DECODER)


def image_side(model: hf.LlavaForConditionalGeneration) -> int:
    """Pixels per side of the model's images."""
    return model.config.vision_config.image_size


def image_tokens(model: hf.LlavaForConditionalGeneration) -> int:
    """Placeholders per image, as the model's projector makes them now."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    out_grid = getattr(model.model.multi_modal_projector, "out_grid", lambda grid: grid)
    h, w = out_grid((side, side))
    return h * w


def batch(
    model: hf.LlavaForConditionalGeneration,
    images: tuple[int, ...] = (1, 2, 0),
    *,
    padding: str = "left",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A batch of prompts with so many images each, padded to one length; text before, between and after images."""
    generator = torch.Generator().manual_seed(seed)
    per_image = image_tokens(model)
    rows = []
    for count in images:
        row = _text(3, generator)
        for _ in range(count):
            row += [IMAGE_TOKEN] * per_image + _text(2, generator)
        rows.append(row + _text(2, generator))
    length = max(map(len, rows))
    pads = [[PAD_TOKEN] * (length - len(row)) for row in rows]
    padded = [pad + row if padding == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    ids = torch.tensor(padded)
    side = image_side(model)
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD_TOKEN).long()}
    if sum(images):
        inputs["pixel_values"] = torch.randn(sum(images), 3, side, side, generator=generator)
    return inputs


def _text(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(2, 80, (count,), generator=generator).tolist()


def randomise(handle: Any, *, std: float = 0.3, seed: int = 1) -> None:
    """Gives the blocks weights that change the output, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)


def skip_if_the_host_fails(way: str) -> None:
    """Skips what this version of transformers gets wrong for the host alone."""
    since = {"chunked prefill": "5.23"}.get(way)
    if since is not None and Version(hf.__version__) < Version(since):
        pytest.skip(f"{way} of LLaVA alone is wrong before transformers {since}")


def set_checkpointing(model: Any, *, use_reentrant: bool | None) -> None:
    """Switches activation checkpointing on, or off for None, by the name that this version of transformers has."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if use_reentrant is None:
        getattr(model, f"{kind}_checkpointing_disable")()
    else:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": use_reentrant})
