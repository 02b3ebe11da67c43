"""ToMe in a vision encoder: its later blocks run on fewer tokens, and what they make is laid out over all places again.

Hooks cannot reach between a block's attention and its MLP, where the paper merges; tokens are merged between blocks.
Behind the encoder each patch is in the state of the token that it is part of, so hosts find the grid that they expect,
and all but one of each token's patches are dropped in front of the decoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.adapters.encoder_pruning import Choice, EncoderPrunerAttachment, feature_level
from vision_remember.adapters.resolve import HostParts
from vision_remember.encoder import EncoderSpec, find, find_module, project
from vision_remember.pruning import ToMe
from vision_remember.pruning.tome import Merged, merge


@dataclass
class Merging(Choice):
    """What one run of the encoder merged.

    Attributes:
        merged: what the tokens of the current block stand for.
        metric: (T, m, d), by which they are alike.
        known: what tokens stood for, by their number.
    """

    merged: Merged | None = None
    metric: Tensor | None = None
    known: dict[int, Merged] = field(default_factory=dict)


class ToMeAttachment(EncoderPrunerAttachment):
    """ToMe in one host."""

    pruner: ToMe
    choice = Merging

    def __init__(self, parts: HostParts, name: str, pruner: ToMe) -> None:
        super().__init__(parts, name, pruner)
        self._merges = pruner.merges(self._grid[0] * self._grid[1], self._level)

    def _follow(self) -> None:
        for index, block in enumerate(self._blocks):
            self._handles.append(block.register_forward_pre_hook(_BeforeBlock(self, index), with_kwargs=True))
        self._handles.append(self._encoder.register_forward_hook(self._lay_out))

    def before_block(self, index: int, block: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens that a block is to be given, and a bias on its attention's logits, (T, 1, 1, m) or None."""
        merging = self._choices.innermost()
        if not isinstance(merging, Merging):
            return hidden, None
        spec = self._encoder_spec
        if index == 0:
            merging.merged = Merged.nothing(len(hidden), hidden.shape[1], hidden.device)
        assert merging.merged is not None
        if index in range(1, self._level) and self._merges[index - 1]:
            assert merging.metric is not None
            count = self._merges[index - 1]
            with torch.autocast(hidden.device.type, enabled=False):  # it would narrow what is to be compared
                hidden, merging.merged = merge(hidden, merging.metric, merging.merged, count, spec.prefix_tokens)
        merging.known[hidden.shape[1]] = merging.merged
        if index < self._level - 1:
            merging.metric = _metric(block, spec, hidden)
        if not self.pruner.proportional or index == 0:
            return hidden, None
        return hidden, merging.merged.sizes.log().to(hidden.dtype)[:, None, None]

    def _lay_out(self, encoder: nn.Module, args: Any, output: Any) -> None:
        """Hook: every state that the encoder returns gets a row for each patch, and the choice is known."""
        merging = self._choices.innermost()
        if not isinstance(merging, Merging):
            return
        for name, value in output.items():
            if isinstance(value, tuple):
                output[name] = tuple(_laid_out(state, merging.known) for state in value)
            else:
                output[name] = _laid_out(value, merging.known)
        prefix, count = self._encoder_spec.prefix_tokens, self._grid[0] * self._grid[1]
        last = merging.known[prefix + count - sum(self._merges)]
        keep = torch.zeros(len(last.places), prefix + count, dtype=torch.bool, device=last.places.device)
        merging.keep = keep.scatter(1, last.places, True)[:, prefix:]


@dataclass
class _BeforeBlock:
    """The hook in front of a block. An object, not a closure, so that copies of the model get hooks of their own."""

    attachment: ToMeAttachment
    index: int

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(inspect.signature(block.forward).parameters, args, strict=False)), **kwargs}
        hidden, bias = self.attachment.before_block(self.index, block, given["hidden_states"])
        given["hidden_states"] = hidden
        if bias is not None:
            given["attention_mask"] = bias
        # What came by place goes on by place: transformers reads the first block's input there.
        names = list(given)
        return tuple(given[name] for name in names[: len(args)]), {name: given[name] for name in names[len(args) :]}


def check_merging(parts: HostParts, pruner: ToMe) -> None:
    """Raises ValueError unless tokens can be merged between this host's encoder blocks."""
    name = type(parts.encoder).__name__
    assert parts.token_grid is not None
    if parts.token_grid != parts.feature_grid:
        raise ValueError(
            f"tome merges patches, and an image token of {type(parts.model).__name__} stands for several: use another "
            "pruner"
        )
    blocks = list(find_module(parts.encoder, parts.encoder_spec.layers, "blocks").children())
    takes: Callable[[str], bool] = inspect.signature(blocks[0].forward).parameters.__contains__
    if not takes("hidden_states") or (pruner.proportional and not takes("attention_mask")):
        raise ValueError(
            f"the blocks of {name} take no bias for their attention: use proportional=False or another pruner"
        )
    pruner.merges(parts.token_grid[0] * parts.token_grid[1], feature_level(parts.model, len(blocks)))


@torch.no_grad()
def _metric(block: nn.Module, spec: EncoderSpec, hidden: Tensor) -> Tensor:
    """(T, m, d), the keys of a block, the mean over its heads."""
    normed = find_module(block, spec.norm or "", "attention norm")(hidden)
    heads = int(find(block, spec.num_heads or ""))  # type: ignore[call-overload]
    return project(spec, block, "key", normed).unflatten(-1, (heads, -1)).mean(-2)


def _laid_out(state: Any, known: dict[int, Merged]) -> Any:
    merged = known.get(state.shape[1]) if isinstance(state, Tensor) and state.ndim == 3 else None
    return state if merged is None else merged.unmerged(state)
