"""A small LLaVA whose processor reads any English prompt, one token per character."""

from __future__ import annotations

from typing import Any

import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.hosts import IMAGE_TOKEN, build_llava, image_side, randomise
from tests.test_tiled_hosts import build
from vision_remember import attach_vision_remember, compress_projector

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:;?!()'\"-/&<>[]"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{{ '\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token per character, and the hosts' placeholder."""
    words = {"<pad>": 0, "<unk>": 1, "<image>": IMAGE_TOKEN, **{c: i + 2 for i, c in enumerate(CHARACTERS)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def processor(side: int = 32, patch: int = 4) -> hf.LlavaProcessor:
    """Of the small LLaVA with CLIP."""
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return hf.LlavaProcessor(
        images, tokenizer(), patch, "default", num_additional_image_tokens=1, chat_template=TEMPLATE
    )


def small_model(*, compressed: bool = True, remember: bool = True) -> tuple[Any, hf.LlavaProcessor]:
    """(model, its processor): 16 vision tokens instead of 64, and blocks that change the answers."""
    model = build_llava()
    reader = processor(image_side(model))
    if compressed:
        compress_projector(model, reader, "adaptive_avg_pool", ratio=4)
    if remember:
        # with these weights the answers to most images have letters, and several
        randomise(attach_vision_remember(model, layers=[1, 2], levels=[2, 4]), std=1.0, seed=7)
    return model, reader


def tiled_model() -> tuple[Any, hf.LlavaNextProcessor]:
    """The same as a LLaVA-NeXT, which cuts images into tiles."""
    model = build("llava_next", "clip")
    vision = model.config.vision_config
    images = LlavaNextImageProcessorPil(
        image_grid_pinpoints=model.config.image_grid_pinpoints,
        size={"shortest_edge": vision.image_size},
        crop_size={"height": vision.image_size, "width": vision.image_size},
    )
    reader = hf.LlavaNextProcessor(
        images, tokenizer(), vision.patch_size, "default", num_additional_image_tokens=1, chat_template=TEMPLATE
    )
    compress_projector(model, reader, "adaptive_avg_pool", ratio=4)
    randomise(attach_vision_remember(model, layers=[1, 2], levels=[2, 4]), std=1.0)
    return model, reader
