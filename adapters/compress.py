"""Swaps a host's projector for one that makes fewer tokens, and tells the processor."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.devices import refuse_absent
from vision_remember.adapters.processor import PlaceholderCount, tokens_per_tile
from vision_remember.adapters.pruner_attachment import find_pruner
from vision_remember.adapters.resolve import HostParts, adapted_part, level_field, levels_read, resolve
from vision_remember.adapters.spec import MLLMSpec
from vision_remember.adapters.token_grid import PatchSize, tile_side
from vision_remember.encoder import find_module, level_width, scale_levels
from vision_remember.grid import Grid
from vision_remember.projectors import PROJECTORS, Matryoshka, Projector, build_projector


class CompressionHandle:
    """A swapped projector.

    Attributes:
        projector: the new one.
        token_grid: (h, w) of an image's tokens.
    """

    def __init__(self, parts: HostParts, projector: Projector, processor: Any, count: PlaceholderCount | None) -> None:
        assert parts.feature_grid is not None
        assert parts.spec.projector is not None
        self.projector = projector
        self.token_grid = projector.out_grid(parts.feature_grid)
        self._feature_grid = parts.feature_grid
        self._model, self._path = parts.model, parts.spec.projector
        self._original = find_module(parts.model, parts.spec.projector, "projector")
        self._config: Any = getattr(parts.model, "config", None)
        self._field = level_field(parts.model)
        self._own_layer = levels_read(parts.model)
        depth = len(list(find_module(parts.encoder, parts.encoder_spec.layers, "blocks").children()))
        self._layers = list(scale_levels(projector.encoder_levels, depth))
        self._patch_size = None if parts.spec.plain else PatchSize(parts.base, self.token_grid)
        self._processor = processor
        self._count = count
        self._restored = False

    def install(self) -> None:
        """Puts the projector and the processor's count in place: both, or neither if anything fails."""
        before = None if self._processor is None else PlaceholderCount.read(self._processor)
        try:
            _replace(self._model, self._path, self.projector)
            if self._layers:
                self._set_levels(self._layers)
            if self._patch_size is not None:
                self._patch_size.install()
            self._tell_processor()
        except BaseException:
            self._undo(before)
            raise

    def set_budget(self, tokens: int | None) -> None:
        """Makes a projector with nested token counts, "matryoshka", emit this many tokens per image from now on.

        The processor then emits as many placeholders. None goes back to the ratio or grid of the construction. Works
        with Vision Remember attached as well: its blocks take the grid of each call.

        Raises:
            ValueError: the projector has no budgets, or the features do not nest into this one. Projector and processor
                are then as they were.
            RuntimeError: the projector is no longer the one that was swapped in.
        """
        if not isinstance(self.projector, Matryoshka):
            raise ValueError(f"{type(self.projector).__name__} has one token count; only 'matryoshka' has budgets")
        self._check_installed()
        if self._patch_size is not None:
            raise ValueError("budgets of tiled images are not followed; compress_projector again with another ratio")
        before = self.projector.budget
        count = None if self._count is None else PlaceholderCount.read(self._processor)
        self.projector.set_budget(tokens)
        try:
            grid = self.projector.out_grid(self._feature_grid)
            self._tell_processor()
        except BaseException:
            self.projector.set_budget(before)
            if count is not None:
                count.write(self._processor)
            raise
        self.token_grid = grid

    def _tell_processor(self) -> None:
        if self._count is None:
            return
        tokens = self.projector.num_tokens(self._feature_grid)
        pixels = side = None
        if self._patch_size is not None:
            pixels, side = self._patch_size.pixels, self._patch_size.side
        PlaceholderCount.for_tokens(self._processor, tokens, self.token_grid, pixels).write(self._processor)
        made = tokens_per_tile(self._processor, side)
        if made != tokens:
            raise ValueError(f"the processor emits {made} image tokens, the projector {tokens}")

    def restore(self) -> None:
        """Puts back the model's own projector, with the weights that it had, and the processor's count.

        Raises:
            RuntimeError: Vision Remember is attached, or the projector is no longer the one that was swapped in.
        """
        if find_attachment(self._model) is not None:
            raise RuntimeError("Vision Remember is attached on top of this projector; detach it first")
        self._check_installed()
        self._undo(self._count)
        self._restored = True

    def _check_installed(self) -> None:
        current = find_module(self._model, self._path, "projector")
        if self._restored or type(current) is not type(self.projector):
            raise RuntimeError(
                f"the projector was restored already, or a {type(current).__name__} stands in its place (if PEFT has "
                "wrapped it, merge_and_unload() first)"
            )
        self.projector = current  # PEFT leaves the copy that it trained

    def _undo(self, count: PlaceholderCount | None) -> None:
        if self._patch_size is not None:
            self._patch_size.uninstall()
        _replace(self._model, self._path, self._original)
        if self._layers:
            self._set_levels(self._own_layer)
        if count is not None:
            count.write(self._processor)

    def _set_levels(self, levels: Any) -> None:
        assert self._field is not None
        setattr(self._config, self._field, levels)

    def __repr__(self) -> str:
        h, w = self.token_grid
        end = f" and {self.projector.end_tokens} at the end" if self.projector.end_tokens else ""
        return f"{type(self.projector).__name__}: {h}x{w} = {h * w} tokens per image{end}"


def compress_projector(
    model: nn.Module,
    processor: Any,
    name: str,
    *,
    ratio: int | None = None,
    out_grid: Grid | None = None,
    spec: MLLMSpec | None = None,
    **options: Any,
) -> CompressionHandle:
    """Swaps the projector of a multimodal model for one that makes fewer vision tokens, in place.

    Where the new projector has the very layers of the model's own, their weights are copied: compressing LLaVA with
    "adaptive_avg_pool" keeps what its MLP learned and changes no parameter's name.

    Args:
        model: a multimodal model of transformers.
        processor: its processor, which then emits the matching number of image placeholders, or one that was saved
            when it did; None if you see to that.
        name: an entry of ``PROJECTORS``.
        ratio: cells per token, a square: 4 makes 24x24 into 12x12.
        out_grid: (h, w) of the tokens instead of a ratio.
        spec: the host's names, for a model that is not in the tables.
        **options: further options of the projector.

    Returns:
        A handle whose ``restore()`` undoes everything.

    Raises:
        ValueError: an unknown host, projector or option, an impossible grid, or a processor that does not belong to the
            model. Model and processor are then as they were.
        RuntimeError: the projector is swapped already, or Vision Remember or a pruner of the encoder is attached on top
            of it.
    """
    if find_attachment(model) is not None:
        raise RuntimeError("compress the projector first, then attach Vision Remember: it reads the token grid")
    pruner = find_pruner(model)
    if pruner is not None and pruner.pruner.where == "encoder":
        raise RuntimeError(
            f"the pruner {pruner.name} is attached, which chooses among the tokens of the model's own projector: "
            "detach it first; pruners of the decoder go with a compressed projector"
        )
    if (ratio is None) == (out_grid is None):
        raise ValueError(f"ratio={ratio}, out_grid={out_grid}: expected exactly one of the two")
    if PROJECTORS[name].needs_text:
        raise ValueError(f"projector {name!r} needs the question beside the image, which a host gives to no projector")
    parts = resolve(model, spec)
    _check_host(parts)
    if isinstance(parts.projector, Projector):
        raise RuntimeError("the projector is compressed already; restore() it first")
    projector = _build(parts, name, ratio, out_grid, options)
    count = None if processor is None else _own_count(parts, processor, projector)
    if projector.end_tokens and not parts.spec.plain:
        raise ValueError(
            f"end_tokens={projector.end_tokens}: {type(parts.model).__name__} stitches tiles, which end nowhere"
        )
    handle = CompressionHandle(parts, projector, processor, count)
    handle.install()
    return handle


def _check_host(parts: HostParts) -> None:
    """Raises ValueError for a host whose projector does not take one tile's cells and return as many tokens."""
    name, geometry = type(parts.model).__name__, parts.spec.geometry
    if not parts.spec.plain and not PatchSize.needed(parts.base):
        raise ValueError(f"{name} packs tiles in a way of its own; it cannot be compressed")
    if parts.projector is None or parts.feature_grid is None:
        raise ValueError(f"{name} has no projector of its own for images of one size; it cannot be compressed yet")
    if parts.feature_grid[0] != parts.feature_grid[1]:
        grid = f"{parts.feature_grid[0]}x{parts.feature_grid[1]}"
        raise ValueError(f"{name} hands its projector {grid} cells without their grid; only a square can be compressed")
    if geometry is not None and geometry.cells != (1, 1):
        raise ValueError(f"the projector of {name} makes fewer tokens than there are cells already")


def new_projector(parts: HostParts, name: str, **options: Any) -> Projector:
    """A projector for this host, not placed in it yet; its weights are those of its construction.

    Raises:
        ValueError: an unknown name or option, or an impossible grid.
    """
    in_dim = _level_width(parts, joined=not PROJECTORS[name].encoder_levels)
    projector = build_projector(name, in_dim, parts.hidden_size, **options)
    if parts.feature_grid is not None:
        projector.out_grid(parts.feature_grid)  # its error, if any, before anything changes
    return projector


def _build(parts: HostParts, name: str, ratio: int | None, out_grid: Grid | None, options: dict[str, Any]) -> Projector:
    assert parts.spec.projector is not None
    original = find_module(parts.model, parts.spec.projector, "projector")
    weights = dict(original.named_parameters())
    if not weights:
        raise ValueError(f"{type(original).__name__} has no parameters to tell the features' width from")
    if adapted_part(original) is not None:
        raise ValueError(
            "PEFT adapts the projector, and a new one could not take over what that learned: compress the projector "
            "first, then get_peft_model"
        )
    quantised = [str(weight.dtype) for weight in weights.values() if not weight.is_floating_point()]
    if quantised:
        raise ValueError(
            f"{type(original).__name__} has weights of {quantised[0]}, which could not be copied: keep the projector "
            "out of the quantisation"
        )
    refuse_absent(weights, type(original).__name__, "compress the projector after loading and before offloading it")
    like = next(iter(weights.values()))
    projector = new_projector(parts, name, ratio=ratio, out_grid=out_grid, **options)
    if projector.encoder_levels and level_field(parts.model) is None:
        raise ValueError(
            f"projector {name!r} reads several encoder levels, which {type(parts.model).__name__} cannot give"
        )
    if _shapes(projector) == _shapes(original):
        # Copies, so that training the new projector leaves the original to restore().
        projector.load_state_dict(copy.deepcopy(original.state_dict()))
        for key, parameter in projector.named_parameters():
            parameter.requires_grad_(weights[key].requires_grad)
    return projector.to(like.device, like.dtype).train(original.training)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _level_width(parts: HostParts, *, joined: bool) -> int:
    """C, width of one level; ``joined``: of what the host gives to its own projector, which may be several levels."""
    layer = levels_read(parts.model)
    return level_width(parts.encoder, parts.encoder_spec) * (
        len(layer) if joined and isinstance(layer, (list, tuple)) else 1
    )


def _own_count(parts: HostParts, processor: Any, projector: Projector) -> PlaceholderCount:
    """How the processor counts for the model's own projector.

    Raises:
        ValueError: it counts neither for that nor, as one does that was saved after compressing, for the new one.
    """
    assert parts.feature_grid is not None
    h, w = parts.feature_grid
    side = None if parts.spec.plain else tile_side(parts.base)
    made = tokens_per_tile(processor, side)
    if made == h * w:
        return PlaceholderCount.read(processor)
    if made != projector.num_tokens(parts.feature_grid):
        raise ValueError(
            f"{type(processor).__name__} emits {made} image tokens per {'image' if side is None else 'tile'}, but the "
            f"model's projector makes {h * w} ({h}x{w}): is it this model's processor?"
        )
    return PlaceholderCount.for_tokens(processor, h * w, parts.feature_grid, None if side is None else side // h)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module
