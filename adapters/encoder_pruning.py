"""Pruners that read the vision encoder: the choice is made while images are encoded, and travels with their tokens.

1. Before the block that makes the host's features, what its attention tells of the patches is computed.
2. Before the projector, the pruner chooses among the tokens of each tile; those that stay may take others in.
   (ToMe does both between the encoder's blocks: :mod:`vision_remember.adapters.tome_in_encoder`.)
3. The choice rides along as one row per token (:mod:`vision_remember.adapters.transport`), through the host's packing,
   through beams and chunks, to the forward pass. Before decoder layer 0 the others are dropped.

The prompt keeps a placeholder for every token, so processors need no change and positions stay what they were.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.adapters.attachment import ENCODER_SLOT, INTERCEPTION
from vision_remember.adapters.encoder_attention import over_tokens, patch_attention
from vision_remember.adapters.encoding import Encoding
from vision_remember.adapters.pruner_attachment import PrunerAttachment
from vision_remember.adapters.resolve import HostParts, level_field, levels_read
from vision_remember.adapters.sample import samples
from vision_remember.adapters.tokens import PIXELS, placeholders, wants_tuple
from vision_remember.adapters.transport import recalls_of, with_rows, without_rows
from vision_remember.encoder import find_module
from vision_remember.memory import Recall, VisionMemory
from vision_remember.pruning import DecoderPruner, EncoderPruner, Evidence, Kept, Pruner, Stage, Tokens
from vision_remember.tap import MultiLevelTap
from vision_remember.threads import RunStack


@dataclass(frozen=True)
class Chosen(DecoderPruner):
    """Drops before the first layer what was chosen beforehand.

    Attributes:
        keep: (B, S) bool, false where a token goes.
    """

    keep: Tensor

    source = "the choice of another pruner"
    reads_prompt = False

    def stages(self, depth: int) -> tuple[Stage, ...]:
        return (Stage(0),)

    def choose(self, stage: int, tokens: Tokens) -> Kept:
        return Kept(tokens.vision & self.keep.to(tokens.vision.device), tokens.hidden)


@dataclass
class Choice:
    """What one run of an encoding method finds out.

    Attributes:
        attention: (T, H*W), of the patches.
        keys: (T, H*W, heads, d), of the patches.
        keep: (T, h*w) bool, the tokens that stay.
    """

    attention: Tensor | None = None
    keys: Tensor | None = None
    keep: Tensor | None = None


class EncoderPrunerAttachment(PrunerAttachment):
    """What pruners of the encoder have in common; a subclass says how tokens are chosen while images are encoded."""

    choice: type[Choice] = Choice

    def __init__(self, parts: HostParts, name: str, pruner: Pruner) -> None:
        super().__init__(parts, name, pruner)
        assert parts.token_grid is not None
        self._grid = parts.token_grid
        self._image_token = parts.image_token_id
        self._encoder, self._encoder_spec = parts.encoder, parts.encoder_spec
        self._blocks = list(find_module(parts.encoder, parts.encoder_spec.layers, "blocks").children())
        self._level = feature_level(parts.model, len(self._blocks))
        self._tap = MultiLevelTap(parts.encoder, (0,), saliency=None, spec=parts.encoder_spec)
        self._encoding = Encoding(parts.model, parts.spec, self._tap, None, [])
        self._choices: RunStack[Choice] = RunStack()

    def install(self) -> None:
        super().install()
        try:
            self._tap.install()
            INTERCEPTION.add(self._base)
            setattr(self._base, ENCODER_SLOT, self)
            self._follow()
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        super().uninstall()
        if self._base.__dict__.pop(ENCODER_SLOT, None) is self:
            INTERCEPTION.release(self._base)
            self._tap.remove()

    def _follow(self) -> None:
        """Puts the hooks of the encoder in place."""
        raise NotImplementedError

    @torch.no_grad()
    def try_out(self) -> None:
        """Encodes a small noise image.

        Raises:
            ValueError: the host makes its tokens in a way that cannot be followed.
        """
        base: Any = self._base
        encode = INTERCEPTION.original(base, "get_image_features")
        for sample in samples(base, base.get_image_features, self._encoder, self._encoder_spec):
            try:
                encode(base, **sample)
            except Exception:  # not the form that this host takes
                continue
            try:
                self._encode(base, encode, **sample, return_dict=True)
            except Exception as error:
                raise ValueError(
                    f"{type(self.model).__name__} makes its image tokens in a way that a pruner of the encoder cannot "
                    f"follow; use a pruner of the decoder, as fastv ({error})"
                ) from error
            return

    def __call__(self, base: nn.Module, method: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        """An encoding method called by anyone but us: the choice rides along in the output."""
        if not self.enabled or self._encoding.running or name != "get_image_features":
            return method(base, *args, **kwargs)
        as_tuple = wants_tuple(base, kwargs.pop("return_dict", None))
        output = with_rows(*self._encode(base, method, *args, **kwargs, return_dict=True))
        return output.to_tuple() if as_tuple else output

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled host is one more instance, perhaps in a process that never attached.
        self.__dict__.update(state)
        INTERCEPTION.add(self._base)

    def _encode(
        self, base: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, tuple[VisionMemory, ...]]:
        """What the method returns, and which tokens stay, as memories of one channel."""
        named = dict(zip(list(inspect.signature(method).parameters)[1:], args, strict=False)) | kwargs
        level = feature_level(self.model, len(self._blocks), named.get(level_field(self.model) or ""))
        if level != self._level:
            raise ValueError(
                f"the features of encoder level {level} are asked for, and the pruner was attached to those of level "
                f"{self._level}: set model.config.vision_feature_layer, then attach"
            )
        with self._choices.running(self.choice()) as choice:
            output, known = self._encoding.run(base, method, "image", *args, **kwargs)
        (memory,) = known
        if choice.keep is None or memory.token_grid != self._grid:
            raise ValueError(
                f"{type(base).__name__} makes its image tokens in another way than by its projector alone; use a "
                "pruner of the decoder"
            )
        return output, (dataclasses.replace(memory, levels=(choice.keep[..., None],), saliency=None),)

    def _plan(self, base: nn.Module, kwargs: dict[str, Any]) -> DecoderPruner:
        """What is to be dropped of a call. Encodes raw pixels, which it replaces in ``kwargs`` by the result."""
        encoded = dict(kwargs.get("mm_encoder_outputs") or {})
        places = placeholders(base, kwargs, self._image_token)
        recalls: list[Recall] = []
        if encoded.get("image") is not None:
            recalls += recalls_of(encoded["image"], places, "the pruner", "pruner")
            encoded["image"] = without_rows(encoded["image"])
        for modality, names in PIXELS.items():
            if encoded.get(modality) is not None or all(kwargs.get(name) is None for name in names):
                continue
            method = INTERCEPTION.original(base, f"get_{modality}_features")
            arguments = {name: kwargs[name] for name in inspect.signature(method).parameters if name in kwargs}
            if modality == "image":
                encoded[modality], (memory,) = self._encode(base, method, **arguments, return_dict=True)
                recalls.append(memory.recall_images(range(len(memory.spans)), places))
            else:  # stays whole; hosts take no raw pixels beside what is encoded
                encoded[modality] = method(base, **arguments, return_dict=True)
        kwargs.update((name, None) for names in PIXELS.values() for name in names if name in kwargs)
        kwargs["mm_encoder_outputs"] = encoded
        keep = torch.ones_like(places)
        for recall in recalls:
            for memory, layout in recall.parts:
                keep = _scattered(keep, memory.levels[0].flatten(), layout.positions, layout.slots)
        return Chosen(keep)


class AttentionAttachment(EncoderPrunerAttachment):
    """A pruner that chooses by the attention of the encoder."""

    pruner: EncoderPruner

    def __init__(self, parts: HostParts, name: str, pruner: EncoderPruner) -> None:
        super().__init__(parts, name, pruner)
        assert parts.feature_grid is not None
        assert parts.spec.projector is not None
        self._cells, self._projector = parts.feature_grid, parts.spec.projector

    def _follow(self) -> None:
        self._handles.append(self._blocks[self._level - 1].register_forward_pre_hook(self._look, with_kwargs=True))

    def _encode(
        self, base: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, tuple[VisionMemory, ...]]:
        thread = threading.get_ident()

        def choose(projector: nn.Module, given: tuple[Any, ...]) -> Any:
            return self._choose(given) if threading.get_ident() == thread else None

        # For this one call: PEFT may wrap or copy a projector at any time, and a copy must not take the hook along.
        handle = find_module(self.model, self._projector, "projector").register_forward_pre_hook(choose)
        try:
            return super()._encode(base, method, *args, **kwargs)
        finally:
            handle.remove()

    def _look(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: reads the attention of the block that makes the features."""
        if (choice := self._choices.innermost()) is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            choice.attention, choice.keys = patch_attention(block, self._encoder_spec, hidden, heads=self.pruner.heads)

    def _choose(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The projector's arguments, changed by the choice among the tokens that it is about to make."""
        choice = self._choices.innermost()
        assert choice is not None
        features: Tensor = args[0]
        self._check(features)
        assert choice.attention is not None
        assert choice.keys is not None
        evidence = Evidence(
            over_tokens(choice.attention, self._cells, self._grid).to(features.device),
            over_tokens(choice.keys, self._cells, self._grid).to(features.device),
            features,
            self._grid,
        )
        with torch.autocast(features.device.type, enabled=False):  # it would narrow what is to be compared
            selection = self.pruner.select(evidence)
        choice.keep = selection.keep
        return (selection.features, *args[1:])

    def _check(self, features: Tensor) -> None:
        h, w = self._grid
        if features.ndim != 3 or features.shape[1] != h * w:
            raise ValueError(
                f"the projector is given {tuple(features.shape)}: a pruner of the encoder expects (tiles, {h * w}, "
                f"width), one row for each token of {h}x{w}"
            )


def feature_level(model: nn.Module, depth: int, layers: Any = None) -> int:
    """The encoder level that a host's projector reads; the deepest where it reads several.

    Args:
        model: the host.
        depth: of its encoder.
        layers: what a call asks for; None for what the configuration says.
    """
    if layers is None:
        layers = levels_read(model)
    chosen = [-1] if layers is None else [layers] if isinstance(layers, int) else list(layers)
    return max(layer if layer >= 0 else depth + 1 + layer for layer in chosen)


def _scattered(keep: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor | None) -> Tensor:
    """(B, S) with the tokens' choice at their positions; what is no token of a tile stays."""
    # One more for the positions that hold no token.
    padded = torch.cat([tokens, tokens.new_ones(1)]).to(keep.device)
    values = padded[:-1] if slots is None else padded[slots.to(keep.device)]
    return keep.flatten().index_copy(0, positions.to(keep.device), values).view_as(keep)
