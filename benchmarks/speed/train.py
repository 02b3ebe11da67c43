"""One training step of the paper's first phase, projector and blocks: time and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.speed.hosts import build, prompt
from benchmarks.speed.measure import Plan, Result, measure
from vision_remember import attach_vision_remember, compress_projector

# A CPU takes minutes for a step of the whole; the cost per layer is the same.
_LAYERS_ON_CPU = 6


def run(plan: Plan) -> list[Result]:
    """With and without blocks, activation checkpointing off and on."""
    decoder = "tiny" if plan.small else "Qwen2-0.5B"
    layers = None if plan.device == "cuda" or plan.small else _LAYERS_ON_CPU
    case = decoder if layers is None else f"{decoder}, {layers} layers of each tower"
    candidates = {
        f"{name}{', checkpointed' if checkpointed else ''}": _step(decoder, plan, layers, options, checkpointed)
        for checkpointed in (False, True)
        for name, options in {"pooled": None, "SELA": {}, "SELA absorbed": {"absorb": True}}.items()
    }
    return measure(plan, case, candidates)


def _step(
    decoder: str, plan: Plan, layers: int | None, options: dict[str, Any] | None, checkpointed: bool
) -> Callable[[], None]:
    model = build(decoder, plan.device, dtype=plan.dtype, layers=layers)
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    model.requires_grad_(False)
    if options is not None:
        attach_vision_remember(model, [1, 4], **options).module.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    if checkpointed:
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    inputs = prompt(model)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()

    return step
