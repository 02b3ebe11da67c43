"""Small hosts of transformers' image-text-to-text mapping: default configurations, shrunk, with random weights."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import transformers as hf
from packaging.version import Version
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.zoo_configs import GIVEN, IMAGE_TOKEN, OWN, TEXT, VISION, shrink, small_rope
from vision_remember.adapters.resolve import HostParts
from vision_remember.adapters.sample import samples
from vision_remember.adapters.tokens import image_tokens

CLASSES: dict[str, str] = {
    model_type: names if isinstance(names, str) else names[0]
    for model_type, names in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
}
_CROSS, _OWN_CODE = "looks at images by cross-attention", "they reach the language model by code of its own"
_NO_ENCODER, _GENERATE = "names no encoder", r"has a generate\(\) of its own"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("evolla", "idefics", "mllama", "pix2struct"), _CROSS),
    **dict.fromkeys(
        ("blip", "diffusion_gemma", "git", "instructblipvideo", "kosmos-2", "kosmos-2.5", "mistral4", "pi0"), _OWN_CODE
    ),
    # since transformers 5.24 these have get_image_features
    "kosmos-2": f"{_OWN_CODE}|{_GENERATE}",
    "kosmos-2.5": f"{_OWN_CODE}|asks for flattened_patches",
    **dict.fromkeys(("pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"), _CROSS),
    **dict.fromkeys(("chameleon", "emu3", "fuyu", "gemma4_unified"), _NO_ENCODER),
    **dict.fromkeys(("blip-2", "instructblip"), _GENERATE),
    "florence2": "is an encoder-decoder",
    **dict.fromkeys(("glm5_next", "qwen4_exp"), "hand on 2 streams of hidden states"),
    "inkling_mm_model": "has no list of blocks",
    "molmo2": "asks for image_token_pooling, image_grids",
    "deepseek_ocr2": "a hidden state holds 512 positions, but the patch grid=64x64 has 4096",
    **dict.fromkeys(("hunyuan_vl", "unlimited_ocr"), "packs tokens in a way of its own"),
    "inkling2": "could not find out which part of an image each token stands for",
}
"""Hosts that Vision Remember cannot be attached to, and what the error says."""
if Version(hf.__version__) >= Version("5.24"):
    REFUSED |= {
        "apertus1p5": _NO_ENCODER,
        "hy_v4_vl": "hand on 4 streams of hidden states",
        "inkling2_loop": REFUSED["inkling2"],
    }
REFUSED_WHEN_TRIED = ("deepseek_ocr2", "hunyuan_vl", "inkling2", "inkling2_loop", "unlimited_ocr")
"""Those whose code has to run to show it."""
FAILS_ALONE = {"llama4": "5.24"}
"""Hosts whose own forward pass raises an AttributeError, with nothing attached: since which version of transformers."""
NEEDS_TIMM = ("fast_vlm", "gemma3n", "perception_lm")
WITH_TIMM = ("fast_vlm", "perception_lm")
"""Those of them that are supported, as ``tests/external`` shows."""
SUPPORTED = tuple(name for name in CLASSES if name not in REFUSED and name not in NEEDS_TIMM)
_PREFIX_ATTENTION = ("paligemma",)
_LARGEST = 50_000_000


def small_config(model_type: str) -> Any:
    """The default configuration of a host, shrunk."""
    config: Any = CONFIG_MAPPING[model_type](**GIVEN.get(model_type, {}))
    given = GIVEN.get(model_type, {})
    if "text_config" not in given and (text := getattr(config, "text_config", None)) is not None:
        shrink(text, TEXT)
        small_rope(text)
    if "vision_config" not in given and getattr(config, "vision_config", None) is not None:
        shrink(config.vision_config, VISION)
    tokens = [name for name in vars(config) if name.endswith(("token_id", "token_index", "patch_id"))]
    for number, name in enumerate(tokens):
        if name in ("image_token_id", "image_token_index", "image_patch_id"):
            setattr(config, name, IMAGE_TOKEN)
        elif isinstance(getattr(config, name), int):
            setattr(config, name, 150 + number)
    for path, value in OWN.get(model_type, {}).items():
        *parents, name = path.split(".")
        setattr(functools.reduce(getattr, parents, config), name, value)
    return config


def build_host(model_type: str) -> Any:
    """A host in eval mode; all weights are random but large enough that images matter to the logits."""
    size = sum(parameter.numel() for parameter in outline(model_type).parameters())
    assert size < _LARGEST, f"{model_type} has {size / 1e6:.0f} million parameters: shrink it in tests/zoo_configs.py"
    torch.manual_seed(0)
    model = getattr(hf, CLASSES[model_type])(small_config(model_type)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all():
                parameter.zero_()
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def outline(model_type: str) -> Any:
    """A host without weights."""
    with torch.device("meta"):
        return getattr(hf, CLASSES[model_type])(small_config(model_type))


def call_inputs(model: Any, parts: HostParts) -> dict[str, Any]:
    """A prompt with two images: the library's own sample, text around it, and what else the host's forward needs."""
    base: Any = parts.base
    sample, counts = _sample(base, parts)
    start = getattr(model.config, "vision_start_token_id", 5)
    row = [3, 4]
    for count in counts:
        row += [start] + [parts.image_token_id] * count + [6, 7]
    ids = torch.tensor([[*row, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **sample}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inspect.signature(type(base).forward).parameters:
            # In PaliGemma 0 marks the prompt, whatever it holds; in others 1 marks the images.
            marked = (ids == parts.image_token_id) & (model.config.model_type not in _PREFIX_ATTENTION)
            inputs[name] = marked.long()
    return inputs


def extended(model: Any, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The inputs of a prompt that was continued with text.

    Args:
        model: that they are for.
        inputs: of the prompt.
        ids: (1, S), the prompt and its continuation.
    """
    longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            more = torch.full_like(ids[:, inputs[name].shape[1] :], int(model.config.model_type in _PREFIX_ATTENTION))
            longer[name] = torch.cat([inputs[name], more], 1)
    return longer


def _sample(base: Any, parts: HostParts) -> tuple[dict[str, Any], list[int]]:
    """Arguments of ``get_image_features`` and how many tokens it makes of each image."""
    failures = []
    forms = samples(base, base.get_image_features, parts.encoder, parts.encoder_spec)
    for sample in [_tiled(base)] if hasattr(base.config, "image_grid_pinpoints") else forms:
        try:
            with torch.no_grad():
                output = base.get_image_features(**sample, return_dict=True)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
        else:
            return sample, [image[..., 0].numel() for image in image_tokens(output)]
    raise AssertionError(failures)


def _tiled(base: Any) -> dict[str, Any]:
    """Two images of a view and two tiles each, whose padding is cut off (LLaVA-NeXT)."""
    side = base.config.vision_config.image_size
    pixels = torch.randn(2, 3, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[side - 2, 2 * side], [2 * side, side]])}
