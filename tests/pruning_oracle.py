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


@contextmanager
def hidden_from(model: Any, padding: Tensor, alive: dict[int, Tensor]) -> Iterator[None]:
    """Inside the ``with``, from each layer in ``alive`` on only those (B, S) are looked at."""
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
            return args, {**kwargs, "attention_mask": additive.to(args[0])}

        return before

    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(hook(index), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: Any, inputs: dict[str, Any], alive: dict[int, Tensor], **more: Any) -> Any:
    """One full forward pass from raw pixels, without a cache."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), hidden_from(model, mask, alive):
        return model(**inputs, position_ids=positions, use_cache=False, **more)


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
    ids = inputs["input_ids"]
    initial = [int((row == IMAGE_TOKEN).sum()) for row in ids]
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
            members = ((ids[row] == IMAGE_TOKEN) & left[row]).nonzero()[:, 0]
            weights = torch.empty(0) if attention is None else attention[row]
            stay = choose(number, weights, members, initial[row])
            left[row, [int(place) for place in members if int(place) not in stay]] = False
        alive[layer] = left
    return alive


def continued(model: Any, inputs: dict[str, Any], alive: dict[int, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Greedy decoding by full forwards: (B, steps) tokens and (B, steps, vocabulary) logits. Dropped is dropped."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens, scores = [], []
    for _ in range(steps):
        out = run(model, {**inputs, "input_ids": ids, "attention_mask": mask}, alive).logits[:, -1]
        scores.append(out)
        tokens.append(out.index_fill(1, torch.tensor([IMAGE_TOKEN]), -torch.inf).argmax(-1, keepdim=True))
        ids = torch.cat([ids, tokens[-1]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        alive = {layer: torch.cat([left, torch.ones_like(left[:, :1])], 1) for layer, left in alive.items()}
    return torch.cat(tokens, 1), torch.stack(scores, 1)


def last_real(inputs: dict[str, Any], row: int) -> int:
    """The place of a row's last token."""
    return int(inputs["attention_mask"][row].nonzero()[-1])
