"""What a multimodal model looks at: the host's side of the analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_remember.adapters.attention_rows import attention_rows
from vision_remember.adapters.pruner_attachment import find_pruner
from vision_remember.adapters.resolve import HostParts, resolve
from vision_remember.adapters.spec import MLLMSpec
from vision_remember.adapters.tokens import placeholders
from vision_remember.analysis import AttentionDensity, TokenGroups, density, token_groups

Queries = Literal["last", "text", "answer"]


@torch.no_grad()
def attention_density(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    queries: Queries | Tensor = "last",
    causal_correction: bool = True,
    spec: MLLMSpec | None = None,
) -> AttentionDensity:
    """Attention density of vision, text and system tokens in every decoder layer (Vision Remember, eq. 1).

    ``density = attention that the tokens receive / their share of the sequence``, by layer and head: 1 where tokens get
    what uniform attention would give them. One forward pass, with or without Vision Remember attached; fused attention
    stays on, only the rows of the chosen queries are recomputed. The model runs in the mode that it is in.

    Every image token of the prompt counts as vision, separators such as LLaVA-NeXT's newlines included.

    Args:
        model: a multimodal model of transformers, or a PEFT model around one.
        inputs: what the processor made of the prompts; B samples of S positions. ``labels`` are not passed on.
        queries: whose attention is measured; several are averaged.

            - "last": the last token of each prompt, which is about to begin the answer. It sees everything.
            - "text": all text behind the first image token.
            - "answer": the positions that predict the tokens with a label (``inputs["labels"]``, -100 for none).
            - (B, S) bool: these positions. Padding never counts.
        causal_correction: see :func:`vision_remember.analysis.density`.
        spec: the host's names, for a model that is not in the tables.

    Returns:
        Densities, (layers, B, heads), on the CPU.

    Raises:
        ValueError: an unknown host or query choice, a mask of another shape, no query at all, a pruner that is not
            disabled, or a decoder that does not attend through transformers' attention functions.
    """
    parts = resolve(model, spec)
    pruner = find_pruner(model)
    if pruner is not None and pruner.enabled:
        raise ValueError(
            f"a pruner is attached ({pruner.name}), and later layers are given fewer tokens than the prompt has: "
            "measure inside `with pruner.disabled():`"
        )
    inputs = dict(inputs)
    labels = inputs.pop("labels", None)
    groups = groups_of(parts, inputs)
    chosen = _chosen(queries, groups, labels)
    positions, counted = _positions(chosen)
    members = (groups.vision, groups.text, groups.system)
    found: dict[int, Tensor] = {}

    def read(layer: int, weights: Tensor, visible: Tensor) -> None:
        here = weights.device
        found[layer] = torch.stack(
            [
                density(
                    weights,
                    group.to(here),
                    visible,
                    queries=counted.to(here),
                    tokens=groups.tokens.to(here),
                    causal_correction=causal_correction,
                )
                for group in members
            ]
        ).cpu()

    with attention_rows(parts.decoder, parts.layers, positions, read):
        parts.base(**inputs)
    if not found:
        raise ValueError(
            f"{type(parts.decoder).__name__} does not attend through transformers' attention functions: its attention "
            "cannot be read"
        )
    nothing = torch.full_like(next(iter(found.values())), torch.nan)
    layers = torch.stack([found.get(layer, nothing) for layer in range(len(parts.layers))], dim=1)
    vision, text, system = layers
    return AttentionDensity(vision, text, system, chosen.sum(1).cpu())


def groups_of(parts: HostParts, inputs: Mapping[str, Any]) -> TokenGroups:
    """Which positions of a host's prompts are what.

    Raises:
        ValueError: inputs without prompts, or a padding mask of another shape.
    """
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        raise ValueError(f"inputs has {sorted(inputs)}: expected input_ids or inputs_embeds among them")
    tokens = [token for token in (parts.image_token_id, parts.video_token_id) if token is not None]
    vision = torch.stack([placeholders(parts.base, dict(inputs), token) for token in tokens]).any(0)
    mask = inputs.get("attention_mask")
    return token_groups(vision, None if mask is None else mask.to(vision.device))


def _chosen(queries: Queries | Tensor, groups: TokenGroups, labels: Tensor | None) -> Tensor:
    """(B, S) bool, the positions whose attention is measured."""
    real = groups.tokens
    if isinstance(queries, Tensor):
        if queries.shape != real.shape or queries.dtype != torch.bool:
            raise ValueError(
                f"queries: {tuple(queries.shape)} {queries.dtype}, expected a bool mask {tuple(real.shape)}"
            )
        chosen = queries.to(real.device) & real
    elif queries == "last":
        chosen = real & (real.flip(1).cumsum(1).flip(1) == 1)
    elif queries == "text":
        chosen = groups.text & (groups.vision.cumsum(1) > 0)
    elif queries == "answer":
        if labels is None or labels.shape != real.shape:
            found = "none" if labels is None else tuple(labels.shape)
            raise ValueError(f"queries='answer' needs inputs['labels'] of shape {tuple(real.shape)}, found {found}")
        chosen = torch.zeros_like(real)
        chosen[:, :-1] = labels.to(real.device)[:, 1:] != -100
        chosen &= real
    else:
        raise ValueError(f"queries={queries!r}: expected 'last', 'text', 'answer' or a (B, S) mask")
    if not chosen.any():
        raise ValueError("no position is left to measure the attention of: queries selects padding or nothing at all")
    return chosen


def _positions(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q) positions of the true ones, those of samples with fewer filled up, and (B, Q) whether each is one."""
    counts = chosen.sum(1)
    counted = torch.arange(int(counts.max()), device=chosen.device) < counts[:, None]
    # Stable: true ones first, in order.
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, : counted.shape[1]], counted
