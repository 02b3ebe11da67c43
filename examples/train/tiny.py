"""A tiny LLaVA-VR with random weights, and a tokenizer of bytes, which knows every text."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast, Qwen2Config

from vision_remember import build_llava_vr
from vision_remember.adapters.llava_vr import LlavaVR

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_SIDE, PATCH = 32, 4


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and Qwen2's marks of turns."""
    alphabet = [PAD, START, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
    )


def vision_config() -> CLIPVisionConfig:
    """8x8 patches of a square of 32 pixels, 6 blocks."""
    return CLIPVisionConfig(
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
    )


def language_config(vocabulary: int) -> Qwen2Config:
    """4 layers of width 64. It drops some attention, so that a resumed run has to find its random numbers again."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        attention_dropout=0.02,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )


def build_tiny(tiles: int = 0, seed: int = 0, **options: object) -> LlavaVR:
    """The tiny LLaVA-VR; the same weights for the same seed.

    Args:
        tiles: as for ``build_llava_vr``.
        seed: of the weights.
        **options: further arguments of ``build_llava_vr``.
    """
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    language = language_config(len(tokenizer) + 1)
    return build_llava_vr(vision_config(), language, tokenizer=tokenizer, tiles=tiles, **options)  # type: ignore[arg-type]
