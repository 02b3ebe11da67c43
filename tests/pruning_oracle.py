"""What pruning has to give, found out without dropping anything.

Tokens that were dropped are hidden from all others by masks, layer by layer, and everything is computed in full. The
attention that decides is that of transformers' eager implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.hosts import IMAGE_TOKEN

Choose = Callable[[int, Tensor, Tensor, int], list[int]]
"""(stage, attention (heads, S, S) of a row, places of its vision tokens, how many there were) -> those that stay."""


Changes = dict[tuple[int, int], Tensor]
"""(row, place) -> the state that a token is given."""


@contextmanager
def hidden_from(
    model: Any, padding: Tensor, alive: dict[int, Tensor], changed: dict[int, Changes] | None = None
) -> Iterator[None]:
    """Inside the ``with``, from each layer in ``alive`` on only those (B, S) are looked at.

    Args:
        model: the host without a pruner.
        padding: (B, S), what is not padding.
        alive: by layer.
        changed: states that are changed in front of a layer.
    """
    layers = model.model.language_model.layers
    handles = []

    def hook(index: int) -> Callable[..., Any]:
        def before(layer: Any, args: Any, kwargs: Any) -> Any:
            seen = padding.bool()
            for first, members in alive.items():
                seen = seen & members if first <= index else seen
            causal = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool).tril()
            # Whatever is hidden sees itself: what comes of it is of no interest, but must be a number.
            mask = (causal & seen[:, None, :]) | torch.eye(seen.shape[1], dtype=torch.bool)
            additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]
            hidden = args[0].clone()
            for (row, place), state in (changed or {}).get(index, {}).items():
                hidden[row, place] = state.to(hidden)
            return (hidden, *args[1:]), {**kwargs, "attention_mask": additive.to(hidden)}

        return before

    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(hook(index), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(
    model: Any,
    inputs: dict[str, Any],
    alive: dict[int, Tensor],
    changed: dict[int, Changes] | None = None,
    **more: Any,
) -> Any:
    """One full forward pass from raw pixels, without a cache."""
    mask = inputs["attention_mask"]
    if "mm_token_type_ids" not in inputs:
        # Other hosts count three kinds of positions, by themselves.
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), hidden_from(model, mask, alive, changed):
        return model(**inputs, use_cache=False, **more)


def survivors(
    model: Any, inputs: dict[str, Any], stages: list[tuple[int, int | None]], choose: Choose
) -> dict[int, Tensor]:
    """Which (B, S) positions are alive from which layer on.

    Args:
        model: the host without a pruner.
        inputs: of the call.
        stages: (layer before which tokens are dropped, layer whose attention decides), in order.
        choose: the algorithm, for one row.
    """
    ids, token = inputs["input_ids"], model.config.image_token_id
    initial = [int((row == token).sum()) for row in ids]
    alive: dict[int, Tensor] = {}
    left = torch.ones_like(ids, dtype=torch.bool)
    implementation = model.config._attn_implementation
    for number, (layer, source) in enumerate(stages):
        attention = None
        if source is not None:
            model.set_attn_implementation("eager")
            attention = run(model, inputs, alive, output_attentions=True).attentions[source]
            model.set_attn_implementation(implementation)
        left = left.clone()
        for row in range(len(ids)):
            members = ((ids[row] == token) & left[row]).nonzero()[:, 0]
            weights = torch.empty(0) if attention is None else attention[row]
            stay = choose(number, weights, members, initial[row])
            left[row, [int(place) for place in members if int(place) not in stay]] = False
        alive[layer] = left
    return alive


Select = Callable[[Tensor, Tensor, Tensor], tuple[list[int], dict[int, Tensor]]]
"""(attention (n,), keys (n, heads, d), features (n, C)) of a tile's tokens -> those that stay, and those rewritten."""


@contextmanager
def rewritten(model: Any, inputs: dict[str, Any], select: Select, *, heads: bool = True) -> Iterator[dict[int, Tensor]]:
    """Inside the ``with`` the projector makes what ``select`` leaves; gives which (B, S) positions are alive.

    Args:
        model: the host without a pruner.
        inputs: of the call.
        select: the algorithm, for one tile.
        heads: the attention is the mean over heads of the encoder's own; otherwise it is computed over the full width.
    """
    with laid_out(model, inputs, *_selections(model, inputs, select, heads)) as alive:
        yield alive


@contextmanager
def laid_out(model: Any, inputs: dict[str, Any], keeps: Tensor, outputs: Tensor) -> Iterator[dict[int, Tensor]]:
    """Inside the ``with`` the projector makes (T, n, D) ``outputs``; gives where ``keeps`` (T, n) is alive."""
    base = model.model
    marks = keeps[..., None].float().expand_as(outputs)
    images = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
    projector = base.multi_modal_projector
    # Newlines are neither one nor zero.
    handle = projector.register_forward_hook(lambda *_: marks)
    with torch.no_grad():
        packed = torch.cat(list(base.get_image_features(**images).pooler_output))
    handle.remove()
    alive = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    alive[inputs["input_ids"] == IMAGE_TOKEN] = (packed != 0).any(-1)
    handle = projector.register_forward_hook(lambda *_: outputs)
    try:
        yield {0: alive}
    finally:
        handle.remove()


def _selections(model: Any, inputs: dict[str, Any], select: Select, heads: bool) -> tuple[Tensor, Tensor]:
    """(T, n) the tokens that stay, (T, n, D) what the projector makes of what is left."""
    base = model.model
    tower, depth = base.vision_tower, model.config.vision_config.num_hidden_layers
    level = depth + 1 + model.config.vision_feature_layer
    names = (f"encoder.layers.{level - 1}", f"encoder.layer.{level - 1}", f"layers.{level - 1}")
    block: Any = next(module for name, module in tower.named_modules() if name in names)
    attention = getattr(block, "self_attn", None) or block.attention
    seen: dict[str, Tensor] = {}

    def keep(name: str, pick: Callable[[Any, Any], Tensor]) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: pick(args, output)})

    handles = [
        attention.register_forward_hook(keep("weights", lambda args, output: output[1])),
        base.multi_modal_projector.register_forward_hook(keep("features", lambda args, output: args[0])),
    ]
    for which in ("q", "k"):
        module = getattr(attention, f"{which}_norm", None) or getattr(attention, f"{which}_proj")
        handles.append(module.register_forward_hook(keep(which, lambda args, output: output)))
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    images = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        base.get_image_features(**images)
    model.set_attn_implementation(implementation)
    for handle in handles:
        handle.remove()
    count = attention.num_heads
    keeps, lefts = [], []
    for tile, features in enumerate(seen["features"]):
        row = seen["weights"][tile].mean(0)[0, 1:]
        if not heads:
            query, keys = seen["q"][tile, 0].double(), seen["k"][tile].double()
            row = (keys @ query / query.shape[-1] ** 0.5).softmax(0)[1:]
        own = seen["k"][tile, 1:].unflatten(-1, (count, -1))
        stay, changed = select(_over_cells(row, len(features)), _over_cells(own, len(features)), features)
        left = features.clone()
        for place, value in changed.items():
            left[place] = value.to(left)
        keeps.append(torch.tensor([place in stay for place in range(len(features))]))
        lefts.append(left)
    with torch.no_grad():
        return torch.stack(keeps), base.multi_modal_projector(torch.stack(lefts))


def _over_cells(values: Tensor, tokens: int) -> Tensor:
    """(N, ...) of patches -> (n, ...) of tokens that stand for squares of them."""
    side, half = round(len(values) ** 0.5), round(tokens**0.5)
    by = side // half
    raster = values.reshape(side, side, -1)
    rows = [
        raster[i * by : (i + 1) * by, j * by : (j + 1) * by].flatten(0, 1).mean(0)
        for i in range(half)
        for j in range(half)
    ]
    return torch.stack(rows).reshape(tokens, *values.shape[1:])


def continued(
    model: Any,
    inputs: dict[str, Any],
    alive: dict[int, Tensor],
    steps: int,
    changed: dict[int, Changes] | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy decoding by full forwards: (B, steps) tokens and (B, steps, vocabulary) logits. Dropped is dropped."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens, scores = [], []
    for _ in range(steps):
        out = run(model, {**inputs, "input_ids": ids, "attention_mask": mask}, alive, changed).logits[:, -1]
        scores.append(out)
        tokens.append(out.index_fill(1, torch.tensor([IMAGE_TOKEN]), -torch.inf).argmax(-1, keepdim=True))
        ids = torch.cat([ids, tokens[-1]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        alive = {layer: torch.cat([left, torch.ones_like(left[:, :1])], 1) for layer, left in alive.items()}
    return torch.cat(tokens, 1), torch.stack(scores, 1)
