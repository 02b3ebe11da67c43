"""The small LLaVA of the demo and its processor, from the host's own classes."""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .pages import GRID, PATCH, SIZE
from .questions import EOS, IMAGE, PAD, SPECIALS, TOKEN_IDS, VOCABULARY

VISION_WIDTH, VISION_LAYERS = 96, 6
TEXT_WIDTH, TEXT_LAYERS = 128, 4
EMBEDDING_STD = 0.25

# The first decoder layer sees only its neighbourhood. A question here is a single token, and with full attention the
# decoder reads the page off in its very first layer, before any block between the layers has had its say: what a block
# then writes is never looked at. In a real language model a question has many words, which the first layers must put
# together before they look at the page.
WINDOW = 4


class TokenPlaces(nn.Module):
    """Adds to every vision token where it lies on the page: a learned row plus a learned column.

    A pooled token gets the mean of the places it covers. The decoder meets these embeddings in its look-up pretraining,
    so that no arm has to find out, within its few training steps, how the projector should write a place.
    """

    def __init__(self, width: int, std: float = EMBEDDING_STD) -> None:
        super().__init__()
        self.row = nn.Parameter(std * torch.randn(GRID, width))
        self.column = nn.Parameter(std * torch.randn(GRID, width))

    def grid(self, side: int) -> Tensor:
        """Places of side x side tokens that cover the page, (side, side, width)."""
        row, column = (part.view(side, GRID // side, -1).mean(1) for part in (self.row, self.column))
        return row[:, None] + column[None, :]

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, side * side, width) -> the same shape."""
        return tokens + self.grid(math.isqrt(tokens.shape[1])).flatten(0, 1)


def add_places(model: LlavaForConditionalGeneration, places: TokenPlaces) -> None:
    """Makes the places a part of the model, behind whatever projector it has."""
    projector = model.model.multi_modal_projector
    projector.places = places
    projector.register_forward_hook(lambda projector, args, tokens: projector.places(tokens))


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA of 1.3 M parameters: CLIP encoder, 12 x 12 patches of width 96; Qwen2 decoder, 4 layers of width 128."""
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=VISION_WIDTH,
        intermediate_size=3 * VISION_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4,
    )
    text = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] + ["full_attention"] * (TEXT_LAYERS - 1),
        initializer_range=0.05,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=GRID**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    # As loud as in a trained language model's residual stream: the first layer then adds to what a token says, and does
    # not drown it.
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=EMBEDDING_STD)
    return model.eval()


def build_processor() -> LlavaProcessor:
    """Turns `text="<image> letter@3,7"` and an image into the model's inputs."""
    backend = Tokenizer(WordLevel(TOKEN_IDS, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=[SPECIALS[IMAGE]],
        padding_side="left",
    )
    images = CLIPImageProcessorPil(
        do_resize=False,
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
