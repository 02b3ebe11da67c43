"""The arms of the comparison: one pretrained model, made into what each arm trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vision_remember import attach_vision_remember, compress_projector
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.encoder import scale_levels
from vision_remember.layout import VisionLayout
from vision_remember.memory import Recall, VisionMemory, spans
from vision_remember.projectors import Projector

from .encoder import Features
from .levels import Shape
from .model import TokenPlaces, add_places, build_model

State = dict[str, Tensor]
Control = Literal["parameters", "compute"]


@dataclass(frozen=True)
class ArmSpec:
    """One arm of the proof.

    Attributes:
        name: What the tables call it.
        projector: An entry of `PROJECTORS`; None keeps the model's own and every vision token.
        ratio: Cells per vision token.
        layers: Decoder layers before which a block runs; empty for none.
        preset: The preset that `overrides` change.
        overrides: Fields of `VisionRememberConfig`.
        gate: A learned factor tanh(g) on every block's update, g = 0 at the start.
        control: An MLP in the place of each block, as large or as costly as the block would be.
        lr: Learning rate; None for the level's.
    """

    name: str
    projector: str | None = "adaptive_avg_pool"
    ratio: int = 4
    layers: tuple[int, ...] = ()
    preset: str = "default"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    gate: bool = False
    control: Control | None = None
    lr: float | None = None

    @property
    def cells(self) -> int:
        """Cells per side of a token that the arm's decoder has learned to read."""
        return max(2, math.isqrt(self.ratio))

    @property
    def token_cells(self) -> int:
        """Cells per side of the arm's own tokens."""
        return self.cells if self.projector else 1

    def recipe(self) -> dict[str, Any]:
        """Everything but the name: arms of two tables that agree in it are run once."""
        recipe = asdict(self)
        del recipe["name"]
        return {**recipe, "layers": list(self.layers), "overrides": dict(self.overrides)}


@dataclass(frozen=True)
class Pretrained:
    """What all arms start from: state dicts of the model and of the token places."""

    model: State
    places: State


@dataclass
class Arm:
    """One arm, ready to train.

    Attributes:
        spec: What it is.
        model: The LLaVA; everything but its vision tower trains.
        grid: (H, W) of the features.
        tokens: Vision tokens per page.
        parameters: All that train, by part: "projector", "blocks" and "decoder".
        handle: What `attach_vision_remember` returned, in the arms that have it.
    """

    spec: ArmSpec
    model: LlavaForConditionalGeneration
    grid: tuple[int, int]
    tokens: int
    parameters: dict[str, int]
    handle: VisionRememberHandle | None

    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def vision_tokens(self, features: Features, index: Tensor, device: str) -> Tensor:
        """The projector's tokens for some pages, (B, tokens, D)."""
        projector = self.model.model.multi_modal_projector
        depth = self.model.config.vision_config.num_hidden_layers
        wanted = scale_levels(getattr(projector, "encoder_levels", ()), depth) or (depth,)
        joined = torch.cat([features.level(level, index, device) for level in wanted], dim=-1)
        made: Tensor = projector(joined, self.grid) if isinstance(projector, Projector) else projector(joined)
        return made

    def options(self, features: Features, index: Tensor, length: int, device: str) -> dict[str, Any]:
        """What the decoder's call carries besides its inputs: the memory of these pages, in sequences of `length`."""
        if self.handle is None:
            return {}
        config = self.handle.config
        assert config.levels is not None
        side, count = math.isqrt(self.tokens), len(index)
        saliency = None if config.saliency is None else features.saliency[config.saliency_center][index].to(device)
        if saliency is not None:  # kept as the variant "logit" at temperature 1
            if config.saliency_temperature != 1:
                saliency = (saliency.logit() / config.saliency_temperature).sigmoid()
            saliency = 1 + saliency if config.saliency_variant == "boost" else saliency
        memory = VisionMemory(
            tuple(features.level(level, index, device) for level in config.levels),
            saliency,
            self.grid,
            (side, side),
            spans([self.tokens] * count, [1] * count),
        )
        # The vision tokens stand first in every sequence.
        starts = torch.arange(count, device=device)[:, None] * length
        positions = (starts + torch.arange(self.tokens, device=device)).flatten()
        return {"vision_remember": Recall(((memory, VisionLayout(positions, None, count, (side, side))),))}


class ResidualMLP(nn.Module):
    """The control: something to compute at the blocks' places, but nothing to look at. It too begins as the identity.

    Args:
        width: D.
        hidden: Inner width.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) -> the same shape, residual included."""
        return tokens + self.down(nn.functional.gelu(self.up(self.norm(tokens))))


class Gate(nn.Module):
    """A factor tanh(g) on what passes through, g = 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, update: Tensor) -> Tensor:
        """Of any shape."""
        return update * self.gate.tanh()


def control_width(kind: Control, block: nn.Module, width: int, tokens: int, cells: int) -> int:
    """Inner width of the MLP that has as many parameters, or multiply-adds per page, as a block of Vision Remember."""
    if kind == "parameters":
        return round((count_parameters(block) - 2 * width) / (2 * width + 1))
    interaction = block.get_submodule("interaction")
    per_cell = sum(p.numel() for name, p in interaction.named_parameters() if name.startswith(("vr_key", "vr_value")))
    per_token = sum(p.numel() for name, p in interaction.named_parameters() if name.startswith(("vr_query", "vr_out")))
    # the attention itself: a logit and a weighted value for every cell that a token sees
    attention = 2 * cells * interaction.attn_dim
    return round((per_cell * cells + per_token * tokens + attention) / (2 * width * tokens))


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def build_arm(
    spec: ArmSpec,
    shape: Shape,
    words: int,
    pretrained: Mapping[int, Pretrained],
    seed: int,
    device: str = "cpu",
) -> Arm:
    """Builds an arm on the pretrained encoder and the decoder of its ratio.

    Without compression that is the decoder of the first ratio. The seed draws the projector and the arm's own blocks.
    """
    model = build_model(shape, words, seed)
    start = pretrained[spec.cells]
    kept = {key: value for key, value in start.model.items() if "multi_modal_projector" not in key}
    model.load_state_dict({**model.state_dict(), **kept})
    torch.manual_seed(seed)
    grid, tokens = (shape.grid, shape.grid), shape.grid**2
    if spec.projector is not None:
        handle = compress_projector(model, None, spec.projector, ratio=spec.ratio)
        tokens = handle.token_grid[0] * handle.token_grid[1]
    decoder = count_parameters(model.model.language_model) + count_parameters(model.lm_head)
    attached = _attach(model, spec) if spec.layers and spec.control is None else None
    if spec.control is not None:
        _add_controls(model, spec, tokens, shape)
    if spec.gate:
        assert attached is not None
        for layer in spec.layers:
            interaction = model.model.language_model.layers[layer].vision_remember.interaction
            interaction.vr_out = nn.Sequential(interaction.vr_out, Gate())
    projector = count_parameters(model.model.multi_modal_projector)
    places = TokenPlaces(shape.grid, shape.text_width)
    places.load_state_dict(start.places)
    add_places(model, places)
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    parameters = {
        "projector": projector,
        "blocks": count_parameters(model.model.language_model) + count_parameters(model.lm_head) - decoder,
        "decoder": decoder,
    }
    return Arm(spec, model.to(device).eval(), grid, tokens, parameters, attached)


def _attach(model: LlavaForConditionalGeneration, spec: ArmSpec) -> VisionRememberHandle:
    return attach_vision_remember(model, layers=spec.layers, preset=spec.preset, **spec.overrides)


def _add_controls(model: LlavaForConditionalGeneration, spec: ArmSpec, tokens: int, shape: Shape) -> None:
    """Runs a ResidualMLP on the vision tokens, which stand first, before each of the spec's decoder layers."""
    assert spec.control is not None
    sized_like = _attach(model, spec)
    layers: Sequence[nn.Module] = [model.model.language_model.layers[index] for index in spec.layers]
    widths = [
        control_width(spec.control, layer.get_submodule("vision_remember"), shape.text_width, tokens, shape.grid**2)
        for layer in layers
    ]
    sized_like.detach()

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        updated = layer.get_submodule("mlp_control")(args[0][:, :tokens])
        return (torch.cat([updated, args[0][:, tokens:]], dim=1), *args[1:])

    for layer, width in zip(layers, widths, strict=True):
        layer.add_module("mlp_control", ResidualMLP(shape.text_width, width))
        layer.register_forward_pre_hook(before)
