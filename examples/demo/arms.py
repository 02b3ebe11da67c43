"""The arms of the comparison: one pretrained model, made into what each arm trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vision_remember import attach_vision_remember, compress_projector
from vision_remember.adapters.handle import VisionRememberHandle

from .models import TEXT_WIDTH, TokenPlaces, add_places, build_model, build_processor
from .pages import SIZE
from .questions import IMAGE

BLOCK_LAYERS = (1, 3)
LEVELS = (2, 4, 6)
RATIO = 4

State = dict[str, Tensor]


@dataclass(frozen=True)
class Pretrained:
    """What all arms start from: state dicts of the model and of the token places."""

    model: State
    places: State


@dataclass(frozen=True)
class Arm:
    """One arm, ready to train.

    Attributes:
        model: The LLaVA; everything but its vision tower trains.
        processor: The processor that emits as many image tokens as the projector gives.
        vision_tokens: Vision tokens per page.
        added_parameters: Parameters of the blocks between decoder layers.
        handle: What `attach_vision_remember` returned, in the arms that have it.
    """

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    vision_tokens: int
    added_parameters: int
    handle: VisionRememberHandle | None


class ResidualMLP(nn.Module):
    """The control: as many parameters as a Vision Remember block, at the same places, but nothing to look at.

    Its output is zero at the start, so that it too begins as the identity.
    """

    def __init__(self, width: int, parameters: int) -> None:
        super().__init__()
        hidden = round((parameters - 3 * width) / (2 * width + 1))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, width) -> the same shape, residual included."""
        return tokens + self.down(nn.functional.gelu(self.up(self.norm(tokens))))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _add_mlp(layer: nn.Module, parameters: int, vision_tokens: int) -> None:
    """Runs a ResidualMLP on the vision tokens, which stand first, before a decoder layer."""
    layer.add_module("mlp_control", ResidualMLP(TEXT_WIDTH, parameters))

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        hidden = args[0]
        if hidden.shape[1] <= vision_tokens:  # a decode step: the vision tokens lie in the cache
            return None
        updated = layer.get_submodule("mlp_control")(hidden[:, :vision_tokens])
        return (torch.cat([updated, hidden[:, vision_tokens:]], dim=1), *args[1:])

    layer.register_forward_pre_hook(before)


def vision_tokens(processor: LlavaProcessor) -> int:
    """Placeholders that the processor emits for a page."""
    blank = Image.new("RGB", (SIZE, SIZE))
    return int((processor(text="<image>", images=blank, return_tensors="pt").input_ids == IMAGE).sum())


def _compress(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    compress_projector(model, processor, "adaptive_avg_pool", ratio=RATIO)


def _attach(model: LlavaForConditionalGeneration, **options: Any) -> VisionRememberHandle:
    return attach_vision_remember(model, layers=BLOCK_LAYERS, levels=LEVELS, **options)


def _add_mlps(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """The control's blocks, each as large as the Vision Remember block that would stand there."""
    sized_like = _attach(model)
    budget = _count(sized_like.module) // len(BLOCK_LAYERS)
    sized_like.detach()
    for index in BLOCK_LAYERS:
        _add_mlp(model.model.language_model.layers[index], budget, vision_tokens(processor))


ARMS = ("uncompressed", "pooled", "pooled + MLP", "pooled + VR", "pooled + VR, no saliency")


def build_arm(name: str, pretrained: Pretrained, seed: int) -> Arm:
    """Builds an arm on the pretrained encoder and decoder; the seed draws the projector and the arm's own blocks."""
    model, processor = build_model(seed), build_processor()
    kept = {key: value for key, value in pretrained.model.items() if "multi_modal_projector" not in key}
    model.load_state_dict({**model.state_dict(), **kept})
    torch.manual_seed(seed)
    if name != "uncompressed":
        _compress(model, processor)
    size_before, handle = _count(model), None
    if name == "pooled + VR":
        handle = _attach(model)
    elif name == "pooled + VR, no saliency":
        handle = _attach(model, saliency=None)
    elif name == "pooled + MLP":
        _add_mlps(model, processor)
    added = _count(model) - size_before

    places = TokenPlaces(TEXT_WIDTH)
    places.load_state_dict(pretrained.places)
    add_places(model, places)
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    return Arm(model.eval(), processor, vision_tokens(processor), added, handle)


def load_arm(name: str, trained: State, pretrained: Pretrained, seed: int) -> Arm:
    """An arm as it was after training; `trained` holds everything but the frozen vision tower."""
    arm = build_arm(name, pretrained, seed)
    arm.model.load_state_dict({**arm.model.state_dict(), **trained})
    return arm
