"""The small LLaVA of the proof, from transformers' own classes, and its call on cached features."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from .levels import Shape
from .words import IMAGE, PAD, Streams, masks

EMBEDDING_STD = 0.25

# The first decoder layer sees its neighbourhood only. Questions are short, and with full attention a small decoder
# reads the page off in its very first layer, before any block between the layers has had its say. In a real language
# model the first layers must put many words together before they look at the page.
WINDOW = 8


class TokenPlaces(nn.Module):
    """Adds to every vision token where it lies on the page: a learned row plus a learned column.

    A pooled token gets the mean of the places it covers, as loud as the place of a single cell. The decoder meets these
    embeddings in its pretraining, so that no arm has to find out within its few steps how a projector should write a
    place.

    Args:
        grid: Cells per side of the page.
        width: D.
    """

    def __init__(self, grid: int, width: int) -> None:
        super().__init__()
        self.row = nn.Parameter(EMBEDDING_STD * torch.randn(grid, width))
        self.column = nn.Parameter(EMBEDDING_STD * torch.randn(grid, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, side * side, D) in raster order -> the same shape."""
        return tokens + self.table(math.isqrt(tokens.shape[1]))

    def table(self, side: int | None = None) -> Tensor:
        """(side * side, D), places of tokens that cover the page; None for one token per cell."""
        side = side or len(self.row)
        louder = math.sqrt(len(self.row) / side)
        row, column = (louder * F.adaptive_avg_pool1d(part.T, side).T for part in (self.row, self.column))
        return (row[:, None] + column[None, :]).flatten(0, 1)


def add_places(model: LlavaForConditionalGeneration, places: TokenPlaces) -> None:
    """Makes the places a part of the model, behind whatever projector it has."""
    projector = model.model.multi_modal_projector
    projector.places = places
    projector.register_forward_hook(lambda projector, args, tokens: projector.places(tokens))


def products(device: str, half: bool) -> contextlib.AbstractContextManager[Any]:
    """Inside the ``with`` matrix products run in bfloat16, if they are to."""
    return torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()


def build_model(shape: Shape, words: int, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights: CLIP encoder, Qwen2 decoder."""
    vision = CLIPVisionConfig(
        image_size=shape.grid * shape.cell,
        patch_size=shape.cell,
        hidden_size=shape.vision_width,
        intermediate_size=3 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.heads,
    )
    text = Qwen2Config(
        vocab_size=words,
        hidden_size=shape.text_width,
        intermediate_size=2 * shape.text_width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=1024,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] + ["full_attention"] * (shape.text_layers - 1),
        initializer_range=0.05,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=shape.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    # As loud as in a trained language model's residual stream: the first layer then adds to what a token says, and does
    # not drown it.
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=EMBEDDING_STD)
    return model.eval()


def answer_logits(
    model: LlavaForConditionalGeneration, vision: Tensor, streams: Streams, **decoder_options: Any
) -> tuple[Tensor, Tensor]:
    """The decoder's logits where it has to answer.

    Args:
        model: The LLaVA.
        vision: (B, V, D), vision tokens.
        streams: The questions.
        **decoder_options: Passed on to the decoder and its layers.

    Returns:
        Logits (answers, words) and the right words (answers,), page after page.
    """
    decoder = model.model.language_model
    mask, positions = masks(streams, vision.shape[1], WINDOW)
    hidden = decoder(
        inputs_embeds=torch.cat([vision, decoder.embed_tokens(streams.tokens)], dim=1),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        **decoder_options,
    ).last_hidden_state[:, vision.shape[1] :]
    asked = streams.target >= 0
    return model.lm_head(hidden[asked]), streams.target[asked]
