"""Time to first token through ``generate()``: encoder, projector, prefill and one token; the same as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.speed.hosts import build, placeholder_mask, prompt, twin
from benchmarks.speed.measure import Plan, Result, measure
from vision_remember import attach_pruner, attach_vision_remember, compress_projector
from vision_remember.adapters.llava import LLAVA

_ONE_TOKEN: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
# Without what they say about unread encoder blocks, so that all of them run and nothing is saved.
_WHOLE_ENCODER = replace(LLAVA, feature_levels=None)
_PRUNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "FastV, half": ("fastv", {"layer": 2, "keep": 0.5}),
    "FastV, a quarter": ("fastv", {"layer": 2, "keep": 0.25}),
    "PyramidDrop": ("pyramid_drop", {}),
}
_PLAIN, _BESIDE = "SELA without kernels of ours, whole encoder", "SELA on a side stream, whole encoder"


def run(plan: Plan, decoders: Sequence[str] = (), tiles: Sequence[int] = (), names: Sequence[str] = ()) -> list[Result]:
    """Arms with 144 pooled tokens a tile against each other, against all 576, and against pruning these.

    Args:
        plan: how to measure. With CUDA graphs it is the forward pass alone, since ``generate()`` waits for the GPU.
        decoders: their names; none for the smallest.
        tiles: images in the one prompt, a case for each number; none for one, on a GPU one and five.
        names: arms to measure beside the first; none for all.

    Raises:
        ValueError: an arm that there is not.
    """
    chosen = decoders or (("tiny",) if plan.small else ("Qwen2-0.5B",))
    tiles = tiles or ((1, 5) if plan.device == "cuda" else (1,))
    results = []
    for decoder in chosen:
        base = build(decoder, plan.device, dtype=plan.dtype)
        arms = _arms(base, plan)
        for name in names:
            if name not in arms:
                raise ValueError(f"no arm {name!r}: there are {', '.join(arms)}")
        arms = {name: model for name, model in arms.items() if not names or name in ("pooled", *names)}
        for count in tiles:
            first_token = _prefill if plan.graphs else _generate
            candidates = {name: first_token(model, count) for name, model in arms.items()}
            results += measure(plan, decoder if count == 1 else f"{decoder} x{count}", candidates)
    return results


def _arms(base: Any, plan: Plan) -> dict[str, Any]:
    """Models that share their weights: the pooled one first, as what the others are compared with."""
    arms = {"pooled": _pooled(base), "uncompressed": twin(base)}
    options: dict[str, dict[str, Any]] = {
        "SELA, whole encoder": {"spec": _WHOLE_ENCODER},
        "SELA absorbed, whole encoder": {"spec": _WHOLE_ENCODER, "absorb": True},
        "deformable, whole encoder": {"spec": _WHOLE_ENCODER, "interaction": "deformable"},
        "global, whole encoder": {"spec": _WHOLE_ENCODER, "interaction": "global"},
        "SELA": {},
    }
    width = base.config.text_config.hidden_size
    if plan.device == "cuda":
        options[_PLAIN] = {"spec": _WHOLE_ENCODER}
        options["SELA as wide as the decoder, whole encoder"] = {"spec": _WHOLE_ENCODER, "attn_dim": width}
        if not plan.graphs:  # which hold one stream
            options[_BESIDE] = {"spec": _WHOLE_ENCODER}
    for name, given in options.items():
        arms[name] = _pooled(base)
        handle = attach_vision_remember(arms[name], [1, 4], **given)
        handle.side_stream = name == _BESIDE
        for block in handle.module.values() if name == _PLAIN else ():
            block.interaction.backend = "windowed"
    # How many tokens a pruner leaves the host has to ask the GPU, which a graph cannot hold.
    pruners = {} if plan.graphs else _PRUNERS
    for name, (pruner, given) in pruners.items():
        arms[name] = twin(base)
        attach_pruner(arms[name], pruner, **given)
    return arms


def _pooled(base: Any) -> Any:
    model = twin(base)
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    return model


def _generate(model: Any, tiles: int) -> Callable[[], Any]:
    inputs = prompt(model, tiles)
    return lambda: model.generate(**inputs, **_ONE_TOKEN)


def _prefill(model: Any, tiles: int) -> Callable[[], Any]:
    inputs = prompt(model, tiles)
    # It is all ones; without it neither host nor attention has to ask the GPU whether it is.
    del inputs["attention_mask"]
    model.model.get_placeholder_mask = partial(placeholder_mask, model)
    return torch.no_grad()(lambda: model(**inputs, logits_to_keep=1).logits)
