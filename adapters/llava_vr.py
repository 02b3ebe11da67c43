"""LLaVA-VR, the paper's model: an encoder, a pooled projector, a language model and Vision Remember, put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.image_utils import (  # type: ignore[attr-defined]
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vision_remember.adapters.attach import attach_vision_remember
from vision_remember.adapters.compress import CompressionHandle, compress_projector
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.interactions import interaction_options
from vision_remember.registry import did_you_mean

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"

IMAGE_TOKEN = "<image>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>{% endgeneration %}\n"
    "{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2's turns, images where they stand, and the answers marked, so that a loss can be of them alone."""


@dataclass(frozen=True)
class LlavaVR:
    """What :func:`build_llava_vr` put together; ``print`` it to see its size.

    Attributes:
        model: a LLaVA, or a LLaVA-NeXT if images are cut up, with Vision Remember attached.
        processor: its processor; None without a tokenizer.
        handle: of Vision Remember.
        compression: of the pooled projector.
    """

    model: PreTrainedModel
    processor: Any
    handle: VisionRememberHandle
    compression: CompressionHandle

    @property
    def num_parameters(self) -> int:
        """Parameters of everything; embeddings that two parts share count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def size(self) -> str:
        """The number of parameters as the paper prints it, such as "0.9B"."""
        return f"{self.num_parameters / 1e9:.1f}B"

    def __str__(self) -> str:
        return f"LLaVA-VR {self.size} ({self.num_parameters:,} parameters)\n{self.handle}"


def llava_vr_configs(size: str) -> tuple[CLIPVisionConfig, Qwen2Config]:
    """The encoder and the language model of one of the paper's sizes, "0.9B" or "2.0B", as configurations.

    They are those of ``openai/clip-vit-large-patch14-336`` with ``Qwen/Qwen2-0.5B`` and ``Qwen/Qwen2-1.5B``.

    Raises:
        ValueError: another size.
    """
    if size not in _LANGUAGE_SIZES:
        raise ValueError(f"size={size!r}: {did_you_mean(size, _LANGUAGE_SIZES)}")
    vision = CLIPVisionConfig(
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
    )
    language = Qwen2Config(
        vocab_size=151936,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        **_LANGUAGE_SIZES[size],
    )
    return vision, language


_LANGUAGE_SIZES: dict[str, dict[str, Any]] = {
    "0.9B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "2.0B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
}


def build_llava_vr(
    vision: str | PreTrainedConfig | PreTrainedModel,
    language: str | PreTrainedConfig | PreTrainedModel,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    tiles: int = 0,
    projector: str = "adaptive_avg_pool",
    ratio: int = 4,
    layers: Sequence[int] = (1, 4),
    preset: str = "paper",
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> LlavaVR:
    """Puts LLaVA-VR together: the encoder, a pooled projector, the language model and Vision Remember.

    The projector and the blocks are new; nothing else is. Under ``torch.device("meta")``, configurations give a model
    without memory, to count.

    Args:
        vision: a CLIP or SigLIP encoder: a folder or repository (of the encoder, or of encoder and text model
            together), a configuration (random weights), or the model itself.
        language: a causal language model, likewise; Qwen2 in the paper.
        tokenizer: of the language model; None takes the one beside ``language`` if that is a folder or repository. The
            placeholder ``<image>`` is added to it.
        image_processor: None for the encoder's usual one.
        tiles: into how many tiles an image is cut at most, beside its overview (AnyRes): 0 in the paper's first phase,
            4 in its second. Grids have no more than this many tiles, and sides of at most its root and one more: for 4
            the five grids of LLaVA-NeXT.
        projector: an entry of ``PROJECTORS``.
        ratio: cells per token.
        layers: 0-based decoder layers before which a block runs.
        preset: "paper" or "default". For "paper", ``inner_projections`` are on unless said otherwise: without them the
            larger model has 1.93 billion parameters, and the paper prints 2.0.
        dtype: of all parts; None keeps the parts' own.
        **overrides: fields of :class:`vision_remember.VisionRememberConfig`.

    Raises:
        ValueError: an encoder that is neither CLIP nor SigLIP, a language model of another kind, files without its
            weights, a number of tiles below zero, or what ``compress_projector`` and ``attach_vision_remember`` refuse.
    """
    if tiles < 0 or tiles == 1:
        raise ValueError(f"tiles={tiles}: expected 0 for images as a whole, or 2 and more")
    encoder, decoder = _encoder(vision, dtype), _language_model(language, dtype)
    if tokenizer is None and isinstance(language, str):
        tokenizer = AutoTokenizer.from_pretrained(language)
    token = _last_token(decoder) if tokenizer is None else _placeholder(tokenizer, decoder)
    model = _put_together(encoder, decoder, token, tiles)
    processor = None
    if tokenizer is not None:
        processor = _processor(model.config, tokenizer, image_processor, tiles)
    compression = compress_projector(model, processor, projector, ratio=ratio)
    if preset == "paper" and "inner_projections" in interaction_options(overrides.get("interaction", "sela")):
        overrides = {"inner_projections": True, **overrides}
    handle = attach_vision_remember(model, layers, preset=preset, **overrides)
    return LlavaVR(model, processor, handle, compression)


def pinpoints(tiles: int, side: int) -> list[list[int]]:
    """The sizes, in pixels, to which images are fitted before they are cut into at most so many tiles."""
    longest = math.isqrt(tiles) + 1
    grids = [(rows, columns) for rows in range(1, longest + 1) for columns in range(1, longest + 1)]
    return [[rows * side, columns * side] for rows, columns in grids if 1 < rows * columns <= tiles]


def _encoder(vision: str | PreTrainedConfig | PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    config: Any = AutoConfig.from_pretrained(vision) if isinstance(vision, str) else getattr(vision, "config", vision)
    config = getattr(config, "vision_config", config)
    if config.model_type not in (CLIP, SIGLIP):
        raise ValueError(f"vision={config.model_type!r}: expected a CLIP or SigLIP vision encoder")
    kind: Any = MODEL_MAPPING[type(config)]
    if isinstance(vision, str):
        return _loaded(kind, "vision", vision, config=config, dtype=dtype)
    model: Any = vision if isinstance(vision, nn.Module) else kind._from_config(config)
    model = getattr(model, "vision_model", model)
    return model if dtype is None else model.to(dtype)


def _language_model(language: str | PreTrainedConfig | PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    model: Any
    if isinstance(language, str):
        model = _loaded(AutoModelForCausalLM, "language", language, dtype=dtype)
    else:
        model = language if isinstance(language, nn.Module) else AutoModelForCausalLM.from_config(language)
        model = model if dtype is None else model.to(dtype)
    missing = [name for name in ("model", "lm_head") if not isinstance(getattr(model, name, None), nn.Module)]
    if missing:
        raise ValueError(f"language={type(model).__name__}: expected a causal language model; it has no {missing}")
    return model


def _loaded(kind: Any, part: str, name: str, **options: Any) -> PreTrainedModel:
    """A part with all of its weights: transformers fills in random ones where files hold others."""
    loaded: Any = kind.from_pretrained(name, output_loading_info=True, **options)
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ValueError(
            f"{part}={name!r}: its files lack {len(missing)} weights of a {type(model).__name__} ({missing[0]}, ...), "
            "which would be random ones"
        )
    return model


def _last_token(decoder: PreTrainedModel) -> int:
    """Without a tokenizer, the last row of the embeddings stands for images."""
    return decoder.get_input_embeddings().num_embeddings - 1  # type: ignore[operator,return-value]


def _placeholder(tokenizer: Any, decoder: PreTrainedModel) -> int:
    """The placeholder's token, new if need be, with a row in the embeddings."""
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    token: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if token > _last_token(decoder):  # Qwen2 has spare rows
        decoder.resize_token_embeddings(token + 1, mean_resizing=decoder.device.type != "meta")
    return token


def _put_together(encoder: PreTrainedModel, decoder: PreTrainedModel, token: int, tiles: int) -> PreTrainedModel:
    vision, text = encoder.config, decoder.config
    described: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": token,
        "vision_feature_layer": -2,  # LLaVA's choice; the paper names none for its projector
        "vision_feature_select_strategy": "default" if vision.model_type == CLIP else "full",
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    kind: Any = LlavaForConditionalGeneration
    config: Any = LlavaConfig(**described)
    if tiles:
        kind = LlavaNextForConditionalGeneration
        config = LlavaNextConfig(**described, image_grid_pinpoints=pinpoints(tiles, vision.image_size))
    with torch.device("meta"):  # the parts replace what stands here
        model = kind(config)
    base: Any = model.model
    embeddings: Any = decoder.get_input_embeddings().weight
    # It reads the encoder; LLaVA brings its output to the language model's dtype, which may be another.
    projector = type(base.multi_modal_projector)(config).to(encoder.dtype)
    projector.apply(model._init_weights)
    base.multi_modal_projector = projector.to(embeddings.device)
    if tiles:
        base.image_newline = nn.Parameter(torch.randn_like(embeddings[0]) / math.sqrt(text.hidden_size))
    base.vision_tower, base.language_model, model.lm_head = encoder, decoder.model, decoder.lm_head
    model.tie_weights()
    model.generation_config = decoder.generation_config
    return model.eval()


def _processor(config: Any, tokenizer: Any, image_processor: Any, tiles: int) -> Any:
    vision = config.vision_config
    options = {
        "image_processor": image_processor or _image_processor(config, tiles),
        "tokenizer": tokenizer,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "chat_template": CHAT_TEMPLATE,
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1 if vision.model_type == CLIP else 0,  # CLIP's class token
    }
    return (LlavaNextProcessor if tiles else LlavaProcessor)(**options)


def _image_processor(config: Any, tiles: int) -> Any:
    side, clip = config.vision_config.image_size, config.vision_config.model_type == CLIP
    square = {"height": side, "width": side}
    colours: dict[str, Any] = {
        "image_mean": OPENAI_CLIP_MEAN if clip else IMAGENET_STANDARD_MEAN,
        "image_std": OPENAI_CLIP_STD if clip else IMAGENET_STANDARD_STD,
    }
    if tiles:
        size, grids = {"shortest_edge": side}, config.image_grid_pinpoints
        return LlavaNextImageProcessorPil(size=size, crop_size=square, image_grid_pinpoints=grids, **colours)
    if clip:
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **colours)
    return SiglipImageProcessorPil(size=square, **colours)
