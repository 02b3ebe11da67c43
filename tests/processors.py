"""Real LLaVA processors made from scratch: a word-level tokenizer and an image processor, no hub."""

from __future__ import annotations

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.hosts import IMAGE_TOKEN, VOCABULARY


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Words "w0" ... and "<image>", which has the hosts' placeholder id."""
    words = {f"w{i}": i for i in range(VOCABULARY) if i != IMAGE_TOKEN} | {"<image>": IMAGE_TOKEN}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w0")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def llava_processor(encoder: str, side: int, patch: int) -> hf.LlavaProcessor:
    """The processor of a LLaVA whose encoder takes images of ``side`` pixels in patches of ``patch``."""
    if encoder == "clip":
        images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        # CLIP's token counts, and the default strategy drops it.
        return hf.LlavaProcessor(images, tokenizer(), patch, "default", num_additional_image_tokens=1)
    images = SiglipImageProcessorPil(size={"height": side, "width": side})
    return hf.LlavaProcessor(images, tokenizer(), patch, "full", num_additional_image_tokens=0)
