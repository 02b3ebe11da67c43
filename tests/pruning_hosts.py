"""Small hosts to prune: LLaVA, LLaVA-NeXT and InternVL with several decoders, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tests import test_tiled_hosts as tiled
from tests.hosts import DECODER_CONFIGS, IMAGE_TOKEN, PAD_TOKEN, build_llava
from vision_remember.adapters.tokens import image_tokens

HOSTS = ("llava", "llava_next", "internvl")
DECODERS = ("qwen2", "llama")
IMAGES = ((1, 2, 0), (1,), (2, 1))
_SIZES = [(40, 61), (30, 30), (90, 33), (61, 40)]


def build(host: str, decoder: str = "qwen2") -> Any:
    """A host in eval mode; all weights are random but large enough that images matter to the logits."""
    if host == "llava":
        model = build_llava(decoder)
        if decoder == "mistral":
            # Its later versions have no window.
            model.model.language_model.config.sliding_window = None
        return model
    if host == "llava_next":
        return tiled.build("llava_next", "clip", decoder, vision_feature_layer=-2)
    torch.manual_seed(0)
    vision = hf.InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=[32, 32],
        patch_size=[4, 4],
        use_qk_norm=True,
    )
    config = hf.InternVLConfig(
        vision_config=vision, text_config=DECODER_CONFIGS[decoder](), image_token_id=IMAGE_TOKEN, image_seq_length=16
    )
    model = hf.InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def pixels(model: Any, images: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a processor makes of so many images; LLaVA-NeXT's are of several sizes."""
    if "llava_next" in model.config.model_type:
        return tiled.pixels_of(model, (_SIZES * images)[:images], seed)
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(images, 3, 32, 32, generator=generator)}


def prompt(model: Any, counts: tuple[int, ...] = (1, 2, 0), *, padding: str = "left", seed: int = 0) -> dict[str, Any]:
    """A batch of prompts with so many images each; text before, between and after images."""
    generator = torch.Generator().manual_seed(seed)
    images = pixels(model, sum(counts), seed) if sum(counts) else {}
    lengths: Any = iter(())
    if images:
        with torch.no_grad():
            lengths = iter([len(image) for image in image_tokens(model.model.get_image_features(**images))])
    rows = []
    for count in counts:
        row = text(3, generator)
        for _ in range(count):
            row += [IMAGE_TOKEN] * next(lengths) + text(2, generator)
        rows.append(row + text(4, generator))
    width = max(map(len, rows))
    pads = [[PAD_TOKEN] * (width - len(row)) for row in rows]
    ids = torch.tensor([p + row if padding == "left" else row + p for row, p in zip(rows, pads, strict=True)])
    return {"input_ids": ids, "attention_mask": (ids != PAD_TOKEN).long(), **images}


def text(count: int, generator: torch.Generator) -> list[int]:
    """So many ids of words."""
    return torch.randint(2, 80, (count,), generator=generator).tolist()


def row_of(model: Any, inputs: dict[str, Any], counts: tuple[int, ...], row: int) -> dict[str, Any]:
    """One row of a batch, unpadded, with its own images."""
    ids = inputs["input_ids"][row]
    ids = ids[ids != PAD_TOKEN][None]
    first = sum(counts[:row])
    own = {
        name: value[first : first + counts[row]]
        for name, value in inputs.items()
        if name in ("pixel_values", "image_sizes")
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **(own if counts[row] else {})}


def logits(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    """(B, S, vocabulary) of one forward pass."""
    with torch.no_grad():
        return model(**inputs, **more).logits
