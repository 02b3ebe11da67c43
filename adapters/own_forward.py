"""For hosts whose forward takes raw pixels only: the memory is caught while they encode, and joins their decoder call.

Hand-written models are such. What a forward pass leaves lives in a stack of the thread for as long as the pass lasts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vision_remember.adapters.encoding import Encoding
from vision_remember.adapters.tokens import placeholders
from vision_remember.memory import Recall
from vision_remember.threads import RunStack


@dataclass
class _Pass:
    """One forward pass: its arguments and the recalls of what it encoded."""

    base: nn.Module
    arguments: dict[str, Any]
    recalls: list[Recall] = field(default_factory=list)


class OwnForward:
    """Catches memories inside forward passes of a base.

    Args:
        encoding: encodes with memory.
        token_ids: of the placeholders, by modality.
        keyword: carries the recall to the decoder.
        text: (B, S), where text stands, if a block asks for it.
        nothing: the recall of a training step without images, or None.
        ready: a recall with what can be prepared of it before the decoder runs.
    """

    def __init__(
        self,
        encoding: Encoding,
        token_ids: dict[str, int],
        keyword: str,
        text: Callable[[nn.Module, dict[str, Any]], Tensor | None],
        nothing: Callable[[nn.Module], Recall | None],
        ready: Callable[[Recall | None], Recall | None],
    ) -> None:
        self._encoding, self._token_ids = encoding, token_ids
        self._keyword, self._text, self._nothing, self._ready = keyword, text, nothing, ready
        self._passes: RunStack[_Pass] = RunStack()

    def register(self, base: nn.Module, decoder: nn.Module) -> list[RemovableHandle]:
        """Puts the hooks in place."""
        return [
            base.register_forward_pre_hook(self._open, with_kwargs=True),
            base.register_forward_hook(self._close, always_call=True),
            decoder.register_forward_pre_hook(self._hand_over, with_kwargs=True),
        ]

    @property
    def running(self) -> bool:
        """Whether this thread is in a forward pass."""
        return self._passes.innermost() is not None

    def encode(self, base: nn.Module, method: Callable[..., Any], modality: str, *args: Any, **kwargs: Any) -> Any:
        """What the method returns; the pass keeps the memory."""
        output, known = self._encoding.run(base, method, modality, *args, **kwargs)
        current = self._passes.innermost()
        assert current is not None
        places = placeholders(base, current.arguments, self._token_ids[modality])
        current.recalls += [memory.recall_images(range(len(memory.spans)), places) for memory in known]
        return output

    def _open(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = inspect.signature(base.forward).parameters
        self._passes.push(_Pass(base, {**dict(zip(names, args, strict=False)), **kwargs}))

    def _close(self, base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._passes.pop()

    def _hand_over(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        current = self._passes.innermost()
        if current is None:
            return None
        if current.recalls:
            recall: Recall | None = Recall.joined(current.recalls, self._text(current.base, current.arguments))
        else:
            recall = self._nothing(decoder)
        return None if recall is None else (args, {**kwargs, self._keyword: self._ready(recall)})
