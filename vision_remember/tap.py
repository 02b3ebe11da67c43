"""MultiLevelTap: features of several encoder levels and a saliency map, read by hooks while the encoder runs."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vision_remember.arrangement import arrange
from vision_remember.captured import Awaited, Captured
from vision_remember.encoder import EncoderSpec, find, find_module, last_hook, project, projected, projections
from vision_remember.saliency import Center, cls_saliency
from vision_remember.threads import RunStack

SaliencySource = Literal["auto", "cls", "received", "map_head"]


class MultiLevelTap:
    """Keeps chosen levels of a vision encoder, and a saliency map, while the encoder runs as it always does.

    Only hooks are used: the encoder's numerics, its attention implementation and its state dict stay as they are, and
    no attention map is ever built; the saliency comes from one query row and the keys of one layer, as that layer makes
    them (one whose projections were replaced or hooked since, by PEFT for one, projects twice)::

        tap = MultiLevelTap(encoder, levels=(13, 18, 23))
        with tap.capture() as captured:
            encoder(pixels)
        captured.levels, captured.grid, captured.saliency

    Captures nest and may run in several threads at once; each sees its own run only.

    Args:
        encoder: a vision encoder with a known :class:`EncoderSpec` (CLIP, SigLIP, ...).
        levels: ``hidden_states`` indices: 0 = embeddings, k = output of the k-th block, negatives count from the end.
        saliency: "cls" (needs a CLS token), "received" (each patch's mean attention logit over all patch queries),
            "map_head" (needs a SigLIP pooling head), "auto" ("cls" where there is a CLS token, otherwise "received"),
            or None.
        saliency_level: the level whose block's attention is read; None for the deepest of ``levels``.
        variant: see :func:`vision_remember.cls_saliency`.
        center: see :func:`vision_remember.cls_saliency`.
        temperature: see :func:`vision_remember.cls_saliency`.
        spec: the encoder's spec; None looks it up by the encoder's class.

    Raises:
        ValueError: an unknown encoder, levels that it does not have, or a saliency source that it does not offer.
    """

    def __init__(
        self,
        encoder: nn.Module,
        levels: Sequence[int] = (13, 18, 23),
        *,
        saliency: SaliencySource | None = "auto",
        saliency_level: int | None = None,
        variant: str = "logit",
        center: Center = "none",
        temperature: float = 1.0,
        spec: EncoderSpec | None = None,
    ) -> None:
        self.encoder = encoder
        self.spec = spec or _look_up_spec(encoder)
        self.depth = len(self._blocks())
        self.levels = self._checked_levels(f"levels={list(levels)}", list(levels))
        self.saliency = _checked_source(saliency, self.spec, encoder)
        deepest = max(self.levels) if saliency_level is None else saliency_level
        (self.saliency_level,) = self._checked_levels(f"saliency_level={deepest!r}", [deepest])
        if self.saliency in ("cls", "received") and self.saliency_level == 0:
            raise ValueError("saliency_level=0 are the embeddings; no attention leads to them, choose a level from 1")
        self._saliency_options: dict[str, Any] = {"variant": variant, "center": center, "temperature": temperature}
        self._check_early()
        self._handles: list[RemovableHandle] = []
        self._installs = 0
        self._lock = threading.Lock()
        self._runs: RunStack[Captured] = RunStack()

    def install(self) -> None:
        """Puts the hooks in place until the matching :meth:`remove`."""
        with self._lock:
            self._installs += 1
            if self._installs == 1:
                self._handles = self._register()

    def remove(self) -> None:
        """Undoes one :meth:`install`; the hooks go with the last. Nothing happens if there was none."""
        with self._lock:
            self._installs = max(0, self._installs - 1)
            if self._installs == 0:
                for handle in self._handles:
                    handle.remove()
                self._handles = []

    @contextmanager
    def capture(self) -> Iterator[Captured]:
        """Captures the runs of the encoder in this thread inside the ``with``; the last run counts."""
        self.install()
        try:
            with self.record() as captured:
                yield captured
        finally:
            self.remove()

    @contextmanager
    def record(self) -> Iterator[Captured]:
        """:meth:`capture` for a tap that is installed already."""
        with self._runs.running(Captured(self.levels)) as captured:
            try:
                yield captured
            finally:
                captured._awaited = None  # a run that broke off

    def __getstate__(self) -> dict[str, Any]:
        # A lock can be neither copied nor pickled.
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _blocks(self) -> list[nn.Module]:
        blocks = find_module(self.encoder, self.spec.layers, "blocks")
        if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
            raise ValueError(f"{type(self.encoder).__name__}.{self.spec.layers}: expected a ModuleList of blocks")
        return list(blocks)

    def _check_early(self) -> None:
        """Raises ValueError for what would otherwise fail in the first run: options and names of the spec."""
        cls_saliency(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1), **self._saliency_options)
        if self.spec.patch_embedding is not None:
            find_module(self.encoder, self.spec.patch_embedding, "patch embedding")
        if self.saliency in ("cls", "received"):
            block = self._blocks()[self.saliency_level - 1]
            for path in (
                (self.spec.norm, self.spec.fused)
                if self.spec.fused
                else (self.spec.norm, self.spec.query, self.spec.key)
            ):
                find_module(block, path or "", "saliency")
            try:
                find(block, self.spec.num_heads or "")
            except AttributeError:
                raise ValueError(
                    f"{type(block).__name__} has no {self.spec.num_heads!r}, its number of heads"
                ) from None

    def _checked_levels(self, given: str, levels: list[int]) -> tuple[int, ...]:
        known = range(-self.depth - 1, self.depth + 1)
        if not levels or not all(type(level) is int and level in known for level in levels):
            raise ValueError(
                f"{given}: {type(self.encoder).__name__} has hidden states 0..{self.depth} (or -{self.depth + 1}..-1)"
            )
        resolved = tuple(level % (self.depth + 1) for level in levels)
        if len(set(resolved)) < len(resolved):
            raise ValueError(f"{given}: a level is repeated (hidden states {list(resolved)})")
        return resolved

    def _register(self) -> list[RemovableHandle]:
        blocks = self._blocks()
        handles = [
            self.encoder.register_forward_pre_hook(self._keep_arguments, with_kwargs=True),
            self.encoder.register_forward_hook(self._keep_output),
            # By the first block, not by the encoder: timm's forward_features is no module call.
            blocks[0].register_forward_pre_hook(self._start),
        ]
        if self.spec.patch_embedding is not None:
            patches = find_module(self.encoder, self.spec.patch_embedding, "patch embedding")
            handles.append(patches.register_forward_hook(self._keep_patch_grid))
        for level in self.levels:
            if level == 0:
                handles.append(blocks[0].register_forward_pre_hook(self._keep_embeddings, with_kwargs=True))
            else:
                handles.append(blocks[level - 1].register_forward_hook(_LevelHook(self, level)))
        if self.saliency == "map_head":
            assert self.spec.pooling_head is not None
            head = find_module(self.encoder, self.spec.pooling_head, "pooling head")
            handles.append(head.register_forward_pre_hook(self._keep_head_saliency))
        elif self.saliency is not None:
            block = blocks[self.saliency_level - 1]
            handles.append(block.register_forward_pre_hook(self._ask, with_kwargs=True))
            handles += [m.register_forward_hook(self._keep_projection) for m in projections(self.spec, block)]
            handles.append(block.register_forward_hook(self._give_up))
        return handles

    def _keep_arguments(self, encoder: nn.Module, args: Any, kwargs: Any) -> None:
        captured = self._runs.innermost()
        if captured is not None and self.spec.sizes is not None:
            captured._arguments = _bound(encoder, args, kwargs)

    def _start(self, block: nn.Module, args: Any) -> None:
        if (captured := self._runs.innermost()) is not None:
            captured.forget()

    def _keep_patch_grid(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if (captured := self._runs.innermost()) is not None:
            captured._patch_grid = (output.shape[-2], output.shape[-1])

    def _keep_output(self, encoder: nn.Module, args: Any, output: Any) -> None:
        if (captured := self._runs.innermost()) is not None:
            captured.output = output

    def _keep_embeddings(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._keep_level(0, _first_input(args, kwargs))

    def _keep_level(self, level: int, hidden: Tensor) -> None:
        if (captured := self._runs.innermost()) is not None:
            captured._hidden[level] = self._arranged(captured, hidden)

    def _arranged(self, captured: Captured, hidden: Tensor) -> Tensor:
        """A hidden state with its channels last; the first of a run tells where the cells stand."""
        if self.spec.order == "channels_first":
            hidden = hidden.movedim(1, -1)
        if captured._arrangement is None:
            captured._arrangement = arrange(self.encoder, self.spec, hidden, captured._arguments, captured._patch_grid)
        return hidden

    def _split(self, captured: Captured, hidden: Tensor) -> list[Tensor]:
        """The cells of a hidden state by groups, each (T, H*W, C)."""
        hidden = self._arranged(captured, hidden)
        assert captured._arrangement is not None
        return captured._arrangement.split(hidden)

    @torch.no_grad()
    def _ask(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the block that tells the saliency: waits for its own queries and keys, or makes them at once.

        Never with gradient: under activation checkpointing values from inside a block have none, and the map is a
        weight, not a path for learning.
        """
        captured = self._runs.innermost()
        if captured is None:
            return
        hidden, makers = _first_input(args, kwargs), projections(self.spec, block)
        if makers and all(last_hook(maker) == self._keep_projection for maker in makers):
            captured._awaited = Awaited(block, hidden)
        else:  # projected by something that was put there later, or seen by hooks that may change what it returns
            self._project(captured, block, hidden)

    @torch.no_grad()
    def _keep_projection(self, module: nn.Module, args: Any, output: Any) -> None:
        """Computes the map as soon as queries and keys are there, before anybody can write into them."""
        captured = self._runs.innermost()
        # Where a checkpointed part is run again nobody waits.
        if captured is None or (awaited := captured._awaited) is None:
            return
        if not isinstance(output, Tensor) or output.shape[:-1] != awaited.hidden.shape[:-1]:
            return
        awaited.made[module] = output
        queries, keys = (projected(self.spec, awaited.block, which, awaited.made) for which in ("query", "key"))
        if queries is None or keys is None:
            return
        own = zip(self._split(captured, queries), self._split(captured, keys), strict=True)
        self._keep_maps(captured, awaited.block, ((self._row(queries, part), patches) for part, patches in own))

    @torch.no_grad()
    def _give_up(self, block: nn.Module, args: Any, output: Any) -> None:
        """Behind a block that did not project all its cells."""
        captured = self._runs.innermost()
        if captured is not None and captured._awaited is not None:
            self._project(captured, block, captured._awaited.hidden)

    def _project(self, captured: Captured, block: nn.Module, hidden: Tensor) -> None:
        """The map from queries and keys that are made from the block's input, beside those of its own attention."""
        captured._awaited = None  # its modules are called here as well
        normed = find_module(block, self.spec.norm or "", "attention norm")(hidden)

        def made() -> Iterator[tuple[Tensor, Tensor]]:
            for patches in self._split(captured, normed):
                row = project(self.spec, block, "query", self._row(normed, patches))
                yield row, project(self.spec, block, "key", patches)

        self._keep_maps(captured, block, made())

    def _keep_maps(self, captured: Captured, block: nn.Module, made: Iterable[tuple[Tensor, Tensor]]) -> None:
        """The map of each group, of the query that asks, (T, 1, C), and the patches' keys, (T, H*W, C)."""
        heads = find(block, self.spec.num_heads or "")
        maps = []
        for query, keys in made:
            row, patches = (x.unflatten(-1, (heads, -1)) for x in (query, keys))
            maps.append(cls_saliency(row[:, 0], patches.transpose(1, 2), **self._saliency_options))
        captured._saliency, captured._awaited = maps, None

    def _row(self, whole: Tensor, patches: Tensor) -> Tensor:
        """(B, 1, C): the CLS token's, or the mean of the patches'. The query of a mean is the mean of the queries."""
        if self.saliency == "received":
            return patches.mean(1, keepdim=True)
        assert self.spec.cls_token is not None
        return whole[:, self.spec.cls_token, None]

    @torch.no_grad()
    def _keep_head_saliency(self, head: nn.Module, args: Any) -> None:
        captured = self._runs.innermost()
        if captured is None:
            return
        attention: nn.MultiheadAttention = head.attention  # type: ignore[assignment]
        weights = attention.in_proj_weight.chunk(3)
        biases = attention.in_proj_bias.chunk(3)
        query = nn.functional.linear(head.probe[:, 0], weights[0], biases[0])  # type: ignore[index]
        keys = nn.functional.linear(args[0], weights[1], biases[1]).unflatten(-1, (attention.num_heads, -1))
        query = query.unflatten(-1, (attention.num_heads, -1)).expand(len(keys), -1, -1)
        saliency = cls_saliency(query, keys.transpose(1, 2), **self._saliency_options)
        captured._saliency = [part[..., 0] for part in self._split(captured, saliency[..., None])]


@dataclass
class _LevelHook:
    """A hook that knows its level. An object, not a closure, so that copies of the encoder get hooks of their own."""

    tap: MultiLevelTap
    level: int

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        self.tap._keep_level(self.level, output[0] if isinstance(output, tuple) else output)


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "hidden_state"]


def _checked_source(
    source: SaliencySource | None, spec: EncoderSpec, encoder: nn.Module
) -> Literal["cls", "received", "map_head"] | None:
    name = type(encoder).__name__
    if source == "auto":
        return ("received" if spec.cls_token is None else "cls") if spec.has_attention else None
    if source in ("cls", "received") and not spec.has_attention:
        raise ValueError(f"saliency={source!r}: the blocks of {name} have no attention to read it from; use None")
    if source == "cls" and spec.cls_token is None:
        raise ValueError(f"saliency='cls': {name} has no CLS token; use 'received'")
    if source == "map_head":
        try:
            find(encoder, spec.pooling_head or "")
        except AttributeError:
            raise ValueError(f"saliency='map_head': {name} has no pooling head; use 'received'") from None
    elif source not in ("cls", "received", None):
        raise ValueError(f"saliency={source!r}: expected 'auto', 'cls', 'received', 'map_head' or None")
    return source


def _look_up_spec(encoder: nn.Module) -> EncoderSpec:
    # The table stands with the adapters, which the core does not import; it holds plain data.
    return importlib.import_module("vision_remember.adapters.encoders").encoder_spec(encoder)
