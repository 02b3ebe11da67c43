"""Attaching training-free pruners of vision tokens."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from vision_remember.adapters.attach import refuse_compiled
from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.decoder_queries import check_readable
from vision_remember.adapters.encoder_pruning import AttentionAttachment, EncoderPrunerAttachment
from vision_remember.adapters.hosts import HOSTS
from vision_remember.adapters.pruner_attachment import PrunerAttachment, find_pruner
from vision_remember.adapters.resolve import HostParts, model_type_of, resolve
from vision_remember.adapters.spec import MLLMSpec
from vision_remember.adapters.tome_in_encoder import ToMeAttachment, check_merging
from vision_remember.adapters.versions import warn_outside_the_windows
from vision_remember.pruning import DecoderPruner, EncoderPruner, Pruner, ToMe, build_pruner

CUTTABLE = (
    "cohere",
    "llama",
    "mistral",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3",
    "smollm3",
)
"""Decoders whose layers need nothing of a token but its state, its position and its place in the mask."""


def attach_pruner(model: nn.Module, name: str, *, spec: MLLMSpec | None = None, **options: Any) -> PrunerHandle:
    """Attaches a training-free pruner of vision tokens to a multimodal model, in place.

    From the next forward pass on, fewer vision tokens reach the later decoder layers, and their caches; the tokens that
    stay keep their positions, logits keep their shape. Fused attention stays on. ``generate()`` works as before, with
    caches that grow.

    Args:
        model: a multimodal model of transformers, or a PEFT model around one.
        name: an entry of ``PRUNERS``.
        spec: the host's names, for a model that is not in the tables.
        **options: of the pruner; its class in :mod:`vision_remember.pruning` describes them.

    Returns:
        The handle; ``print`` it to see what is dropped where.

    Raises:
        ValueError: an unknown pruner or option, layers that the decoder does not have, or a host in which tokens cannot
            be dropped. The model is then as it was.
        RuntimeError: a pruner is attached already, or Vision Remember is.
    """
    pruner = build_pruner(name, **options)
    if find_attachment(model) is not None:
        raise RuntimeError(
            "Vision Remember is attached to this model, and its blocks look for vision tokens that a pruner may have "
            "dropped; detach_vision_remember(model) first"
        )
    if find_pruner(model) is not None:
        raise RuntimeError("a pruner is attached to this model already; detach it first")
    warn_outside_the_windows()
    refuse_compiled(model, "a pruner")
    parts = resolve(model, spec)
    _check(parts, pruner)
    attachment = _attachment(parts, name, pruner)
    attachment.install()
    try:
        # Others were found out by trying, and so is whether a pruner can follow them.
        if isinstance(attachment, EncoderPrunerAttachment) and parts.spec.name not in HOSTS:
            attachment.try_out()
    except BaseException:
        attachment.uninstall()
        raise
    return PrunerHandle(attachment)


class PrunerHandle:
    """A pruner as attached to one model. ``print(handle)`` shows a table."""

    def __init__(self, attachment: PrunerAttachment) -> None:
        self._own = attachment

    @property
    def pruner(self) -> Pruner:
        """The algorithm and its options."""
        return self._own.pruner

    @property
    def tokens_per_layer(self) -> Tensor | None:
        """(layers, B), vision tokens that each decoder layer was given in the last forward pass with images.

        None before the first such pass. While a pass is under way in another thread, the counts of the last that ended.
        """
        return self._own.last

    def detach(self) -> None:
        """Takes the pruner off the model: module tree and hooks are as before attach. Twice does no harm."""
        self._own.uninstall()

    def disabled(self) -> AbstractContextManager[None]:
        """Inside the ``with`` nothing is dropped, in any thread; caches that were filled before stay usable."""
        return self._own.disabled()

    def __repr__(self) -> str:
        own = self._own
        if not own.installed:
            return f"pruner {own.name} (detached)"
        rows = [
            ("host", type(own.model).__name__),
            ("decoder", f"{own.decoder}, {own.depth} layers"),
            ("method", f"{type(own.pruner).__name__} ({own.pruner.source})"),
            *((name, str(value)) for name, value in own.pruner.options().items()),
            ("drops", _where(own)),
            *_last(own.last),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"pruner {own.name}", *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _attachment(parts: HostParts, name: str, pruner: Pruner) -> PrunerAttachment:
    if isinstance(pruner, ToMe):
        return ToMeAttachment(parts, name, pruner)
    if isinstance(pruner, EncoderPruner):
        return AttentionAttachment(parts, name, pruner)
    return PrunerAttachment(parts, name, pruner)


def _check(parts: HostParts, pruner: Pruner) -> None:
    """Raises ValueError unless tokens can be dropped in this host by this pruner."""
    model_type = model_type_of(parts.decoder)
    if model_type not in CUTTABLE:
        raise ValueError(
            f"vision tokens can be dropped between the layers of {', '.join(CUTTABLE)}; the decoder of "
            f"{type(parts.model).__name__} is {model_type!r}"
        )
    config: Any = parts.decoder.config
    windowed = {"sliding_attention"} if getattr(config, "sliding_window", None) is not None else set()
    kinds = set(getattr(config, "layer_types", None) or windowed) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"this decoder has layers of {', '.join(sorted(kinds))}; a pruner needs layers that attend to everything"
        )
    if isinstance(pruner, DecoderPruner):
        stages = pruner.stages(len(parts.layers))
        if any(stage.attention_of is not None for stage in stages):
            check_readable(model_type)
    else:
        _check_encoder(parts)
        if isinstance(pruner, EncoderPruner):
            _check_choice(parts, pruner)
        if isinstance(pruner, ToMe):
            check_merging(parts, pruner)


def _check_encoder(parts: HostParts) -> None:
    """Raises ValueError unless the encoder shows which of its tokens matter, and the projector makes one of each."""
    host, spec = type(parts.model).__name__, parts.encoder_spec
    advice = "use a pruner of the decoder, as fastv"
    if parts.feature_grid is None or parts.token_grid is None or spec.order != "raster" or parts.projector is None:
        raise ValueError(f"{host} has no fixed grid of image tokens for a pruner of the encoder: {advice}")
    if not spec.has_attention:
        raise ValueError(f"the attention of {type(parts.encoder).__name__} cannot be read: {advice}")
    if hasattr(parts.projector, "out_grid"):
        raise ValueError(
            "compress_projector has made this host's tokens fewer already: restore() that first, or " + advice
        )
    if "mm_encoder_outputs" not in inspect.signature(type(parts.base).forward).parameters:
        raise ValueError(f"{host} takes no images that were encoded ahead: {advice}")


def _check_choice(parts: HostParts, pruner: EncoderPruner) -> None:
    assert parts.token_grid is not None
    if pruner.needs_cls and parts.encoder_spec.cls_token is None:
        raise ValueError(
            f"this pruner goes by the CLS token, and {type(parts.encoder).__name__} has none: faster_vlm and "
            "vision_zip take the attention that all patches pay"
        )
    pruner.check(parts.token_grid[0] * parts.token_grid[1])


def _where(own: PrunerAttachment) -> str:
    if not isinstance(own.pruner, DecoderPruner):
        return "before decoder layer 0, as chosen in the vision encoder"
    layers = ", ".join(str(stage.layer) for stage in own.pruner.stages(own.depth))
    return f"before decoder layers {layers}"


def _last(given: Tensor | None) -> list[tuple[str, str]]:
    """Rows for the vision tokens of each sample in the last pass, neighbouring layers with as many in one."""
    if given is None:
        return [("tokens", "no image has passed yet")]
    rows = []
    for sample, counts in enumerate(given.T.tolist()):
        starts = [layer for layer, count in enumerate(counts) if layer == 0 or count != counts[layer - 1]]
        ends = [start - 1 for start in starts[1:]] + [len(counts) - 1]
        spans = (
            f"{counts[a]} in layer {a}" if a == b else f"{counts[a]} in layers {a}-{b}"
            for a, b in zip(starts, ends, strict=True)
        )
        rows.append((f"tokens, sample {sample}", "; ".join(spans)))
    return rows
