"""Tiny hosts in the form in which the common model tests want them: a configuration and a batch of inputs each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf

VOCABULARY, IMAGE, VIDEO, VISION_START, VISION_END = 99, 4, 5, 6, 7
BATCH, SIDE, PATCH = 3, 8, 2

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_QWEN_TEXT = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "in_channels": 3, "patch_size": 4, "temporal_patch_size": 2}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _square() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(BATCH, 3, SIDE, SIDE)}


def _tiles() -> dict[str, torch.Tensor]:
    pixels = torch.rand(BATCH, 3, 3, SIDE, SIDE)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[SIDE, 2 * SIDE]] * BATCH)}


def _packed() -> dict[str, torch.Tensor]:
    rows, columns = 4, 6
    pixels = torch.rand(BATCH * rows * columns, 3 * 2 * 4 * 4)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]] * BATCH)}


@dataclass(frozen=True)
class Host:
    """A host of the conformance run.

    Attributes:
        model_class: the class that Vision Remember is attached to.
        config: makes its configuration.
        images: makes one image for each sample of the batch.
    """

    model_class: type[Any]
    config: Callable[[], Any]
    images: Callable[[], dict[str, torch.Tensor]]


def _llava(name: str, text: str, vision: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        return getattr(hf, name)(
            text_config=getattr(hf, text)(**_TEXT),
            vision_config=getattr(hf, vision)(**_VISION),
            image_token_id=IMAGE,
            **options,
        )

    return make


def _qwen(name: str, text: dict[str, Any], **vision: Any) -> Callable[[], Any]:
    def make() -> Any:
        return getattr(hf, name)(
            text_config={**_QWEN_TEXT, **text}, vision_config={**_QWEN_VISION, **vision}, **_QWEN_TOKENS
        )

    return make


_PINPOINTS = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]}

HOSTS: dict[str, Host] = {
    "llava": Host(
        hf.LlavaForConditionalGeneration,
        _llava("LlavaConfig", "LlamaConfig", "CLIPVisionConfig", vision_feature_layer=-1),
        _square,
    ),
    "llava_next": Host(
        hf.LlavaNextForConditionalGeneration,
        _llava("LlavaNextConfig", "LlamaConfig", "CLIPVisionConfig", vision_feature_layer=-1, **_PINPOINTS),
        _tiles,
    ),
    "llava_onevision": Host(
        hf.LlavaOnevisionForConditionalGeneration,
        _llava(
            *("LlavaOnevisionConfig", "Qwen2Config", "SiglipVisionConfig"),
            **_PINPOINTS,
            video_token_id=VIDEO,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        _tiles,
    ),
    "internvl": Host(
        hf.InternVLForConditionalGeneration,
        lambda: hf.InternVLConfig(
            text_config=hf.Qwen2Config(**_TEXT),
            vision_config={**_VISION, "image_size": (SIDE, SIDE), "patch_size": (PATCH, PATCH)},
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        ),
        _square,
    ),
    "qwen2_vl": Host(
        hf.Qwen2VLForConditionalGeneration,
        _qwen("Qwen2VLConfig", {}, embed_dim=32, hidden_size=32, mlp_ratio=2),
        _packed,
    ),
    "qwen2_5_vl": Host(
        hf.Qwen2_5_VLForConditionalGeneration,
        _qwen(
            *("Qwen2_5_VLConfig", {}),
            hidden_size=32,
            intermediate_size=37,
            out_hidden_size=32,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        _packed,
    ),
    "qwen3_vl": Host(
        hf.Qwen3VLForConditionalGeneration,
        _qwen(
            *("Qwen3VLConfig", {"head_dim": 8}),
            hidden_size=32,
            intermediate_size=37,
            out_hidden_size=32,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        _packed,
    ),
}


@cache
def tokens_per_image(name: str) -> int:
    """Placeholders for one image, counted on the plain host."""
    host = HOSTS[name]
    model = host.model_class(host.config()).eval()
    with torch.no_grad():
        return len(model.get_image_features(**host.images(), return_dict=True).pooler_output[0])


class ModelTester:
    """What the common tests call a model tester.

    Args:
        name: of the host.
    """

    batch_size = BATCH
    is_training = True

    def __init__(self, name: str) -> None:
        self.host = HOSTS[name]
        config = self.host.config()
        self.text_config, self.vision_config = config.text_config.to_dict(), config.vision_config.to_dict()
        self.hidden_size = _TEXT["hidden_size"]
        self.num_hidden_layers = _TEXT["num_hidden_layers"]
        self.num_attention_heads = _TEXT["num_attention_heads"]
        self.tokens = tokens_per_image(name)
        self.seq_length = self.encoder_seq_length = self.tokens + 8

    def get_config(self) -> Any:
        """A configuration of its own for each caller; the tests write into it."""
        return copy.deepcopy(self.host.config())

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """A configuration and a batch: some text, an image, more text."""
        config = self.get_config()
        ids = torch.randint(10, VOCABULARY - 20, (BATCH, self.seq_length))
        ids[:, 2] = VISION_START
        ids[:, 3 : 3 + self.tokens] = IMAGE
        ids[:, 3 + self.tokens] = VISION_END
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.host.images()}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        return config, inputs
