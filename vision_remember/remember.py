"""The block: vision tokens are normalised, re-read features, and the update is added (Vision Remember, section 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor, nn

from vision_remember.config import VisionRememberConfig
from vision_remember.grid import Grid
from vision_remember.interactions import INTERACTIONS, SELA, TokenMixer, build_interaction, interaction_options
from vision_remember.interactions.bank import lay_side_by_side, save_apart
from vision_remember.interactions.base import check_tokens
from vision_remember.interactions.levels import Features, are_features, is_plain
from vision_remember.interactions.region_cells import PreparedRaster
from vision_remember.interactions.token_mixer import TokenMixerKind
from vision_remember.ops.transforms import has_tangent
from vision_remember.ops.triton_local_attention import DTYPES
from vision_remember.ops.triton_rows import MOST_ROWS, add_update, gather_normalised, write_update

_NORM_EPS = 1e-6


class VisionRemember(nn.Module):
    """Norm, interaction, residual, for the vision tokens in front of one decoder layer; on request a mixer after it.

    The block computes in the dtype of its own weights, so that float32 blocks can train inside a bfloat16 decoder.

    Args:
        query_dim: D, width of the decoder.
        feature_dim: C, width of the features, all levels joined.
        interaction: an entry of ``INTERACTIONS``.
        token_mixer: None; "self" or "text_guided" for a :class:`TokenMixer` after the read.
        **options: options of the interaction.

    Raises:
        ValueError: an unknown interaction or option.
    """

    # The two names by which transformers switches activation checkpointing of any module on and off.
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(
        self,
        query_dim: int,
        feature_dim: int,
        *,
        interaction: str = "sela",
        token_mixer: TokenMixerKind | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        # A weight that nothing depends on would stop distributed training, which waits for its gradient.
        reads = INTERACTIONS[interaction].reads_tokens
        self.norm = nn.RMSNorm(query_dim, eps=_NORM_EPS) if reads else nn.Identity()
        self.interaction = build_interaction(interaction, query_dim, feature_dim, **options)
        self.token_mixer: TokenMixer | None = None
        if token_mixer is not None:
            self.token_mixer = TokenMixer(query_dim, token_mixer, zero_init=options.get("zero_init", True))

    @classmethod
    def from_config(
        cls,
        config: VisionRememberConfig,
        query_dim: int,
        feature_dim: int,
        *,
        num_levels: int = 1,
        level_dims: Sequence[int] | None = None,
    ) -> VisionRemember:
        """The block that a configuration describes.

        Args:
            config: the choices.
            query_dim: D, width of the decoder.
            feature_dim: C, all levels.
            num_levels: encoder levels in the features, all of one width.
            level_dims: the width of each level, where they differ.

        Raises:
            ValueError: the configuration sets something that its interaction does not have.
        """
        options = config.interaction_options(interaction_options(config.interaction))
        if level_dims is not None:
            options["level_dims"] = level_dims
        return cls(
            query_dim,
            feature_dim,
            interaction=config.interaction,
            token_mixer=config.token_mixer,
            num_levels=num_levels,
            **options,
        )

    def prepare(
        self,
        features: Features,
        *,
        feature_grid: Grid,
        saliency: Tensor | None = None,
        token_grid: Grid | None = None,
    ) -> Any:
        """The part of the work that needs the image alone; give the result to :meth:`forward` as ``features``.

        With ``token_grid`` it fits tokens of that grid alone, and spares copies; see :meth:`Interaction.prepare`.
        """
        return self.interaction.prepare(
            self._cast_features(features),
            feature_grid=feature_grid,
            saliency=None if saliency is None else self._cast(saliency),
            token_grid=token_grid,
        )

    @overload
    def forward(
        self,
        tokens: Tensor,
        features: Any,
        *,
        token_grid: Grid,
        feature_grid: Grid,
        saliency: Tensor | None = None,
        text: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens: Sequence[Tensor],
        features: Sequence[Any],
        *,
        token_grid: Sequence[Grid],
        feature_grid: Sequence[Grid],
        saliency: Sequence[Tensor | None] | None = None,
        text: Sequence[Tensor | None] | None = None,
        present: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]: ...

    def forward(
        self,
        tokens: Any,
        features: Any,
        *,
        token_grid: Any,
        feature_grid: Any,
        saliency: Any = None,
        text: Any = None,
        present: Any = None,
    ) -> Any:
        """Tokens that have re-read the features under them.

        Images of several sizes go through in one call when every argument is a list with an entry for each size (None
        stays None): sharded weights are then gathered once.

        Args:
            tokens: (B, h*w, D), the vision tokens of the residual stream, raster order.
            features: (B, H*W, C), raster order, the levels joined on channels; or a list of (B, H*W, c), one per level,
                of whatever widths, which never need a copy that joins them; or what :meth:`prepare` returned.
            token_grid: (h, w).
            feature_grid: (H, W).
            saliency: (B, H*W), or None.
            text: (B, D), what stands for the text; with ``token_mixer="text_guided"`` only. In the stream's own width:
                a mean of hidden states, say. No position may count that a causal model must not know yet.
            present: (B, h*w), bool: the tokens that exist, where the grid has places without one; for the mixer.

        Returns:
            (B, h*w, D), in the dtype of ``tokens``, residual included; a list of them for lists.

        Raises:
            ValueError: shapes and grids that do not fit together, or lists of different lengths.
        """
        if isinstance(tokens, Tensor):
            return self._one_size(tokens, features, token_grid, feature_grid, saliency, text, present)
        lists = {"features": features, "token_grid": token_grid, "feature_grid": feature_grid}
        lists |= {"saliency": saliency, "text": text, "present": present}
        for name, entries in lists.items():
            if entries is not None and (isinstance(entries, Tensor) or len(entries) != len(tokens)):
                found = f"a tensor {tuple(entries.shape)}" if isinstance(entries, Tensor) else f"{len(entries)} entries"
                raise ValueError(f"{name} is {found}, but tokens is a list of {len(tokens)}: expected as many entries")
        columns = [[None] * len(tokens) if entries is None else entries for entries in lists.values()]
        return [self._one_size(*row) for row in zip(tokens, *columns, strict=True)]

    def _one_size(
        self,
        tokens: Tensor,
        features: Any,
        token_grid: Grid,
        feature_grid: Grid,
        saliency: Tensor | None,
        text: Tensor | None,
        present: Tensor | None,
    ) -> Tensor:
        check_tokens(tokens, self.interaction.query_dim)  # before the norm, whose error would name no argument
        parts = tuple(features) if are_features(features) and not isinstance(features, Tensor) else (features,)
        arguments = (tokens, token_grid, feature_grid, saliency, text, present, *parts)
        if self.gradient_checkpointing and self.training:
            # Positional, level by level: a re-entrant checkpoint passes gradients through positional tensors only.
            return self._gradient_checkpointing_func(self._remember, *arguments)
        return self._remember(*arguments)

    def _remember(
        self,
        tokens: Tensor,
        token_grid: Grid,
        feature_grid: Grid,
        saliency: Tensor | None,
        text: Tensor | None,
        present: Tensor | None,
        *parts: Any,
    ) -> Tensor:
        features = parts[0] if len(parts) == 1 else parts
        update = self.interaction(
            self.norm(self._cast(tokens)),
            self._cast_features(features) if are_features(features) else features,
            token_grid=token_grid,
            feature_grid=feature_grid,
            saliency=None if saliency is None else self._cast(saliency),
        )
        tokens = tokens + update.to(tokens.dtype)
        if self.token_mixer is None:
            if text is not None:
                raise ValueError("text was given, but this block has no token_mixer='text_guided'")
            return tokens
        text = None if text is None else self._cast(text)
        return tokens + self.token_mixer(self._cast(tokens), text=text, present=present).to(tokens.dtype)

    def rewrites(self, hidden: Tensor, prepared: Any) -> bool:
        """Whether :meth:`rewrite` does what the forward does between a gather and a scatter of rows.

        Not with derivatives or under autocast, nor where somebody listens or a stranger stands in a module's place.

        Args:
            hidden: (B, S, D).
            prepared: what the forward would get as ``features``.
        """
        if not isinstance(prepared, PreparedRaster) or torch.is_grad_enabled():
            return False
        reader = self.interaction
        plain = is_plain(self, VisionRemember) and is_plain(self.norm, nn.RMSNorm) and self.token_mixer is None
        plain = plain and is_plain(reader.vr_out, nn.Linear)  # type: ignore[arg-type]
        fits = hidden.dtype in DTYPES and hidden.shape[-1] == reader.query_dim
        if not plain or not fits or torch.is_autocast_enabled(hidden.device.type):
            return False
        return not has_tangent(chain([hidden], self.parameters()))

    def rewrite(
        self, hidden: Tensor, positions: Tensor, prepared: PreparedRaster, *, tiles: int, token_grid: Grid
    ) -> Tensor:
        """The residual stream with some rows rewritten: gather, norm and scatter are parts of kernels.

        Args:
            hidden: (B, S, D).
            positions: (T*h*w,), ascending: the rows of all (B*S) that hold the tokens, tile by tile.
            prepared: for kernels, by :meth:`SELA.project_rasters`.
            tiles: how many, T.
            token_grid: (h, w).

        Returns:
            (B, S, D).
        """
        rows, positions = hidden.flatten(0, 1), positions.to(hidden.device)
        reader: SELA = self.interaction  # type: ignore[assignment]
        out: nn.Linear = reader.vr_out  # type: ignore[assignment]
        tokens = gather_normalised(rows, positions, self.norm.weight, _NORM_EPS)
        tokens = tokens.view(tiles, token_grid[0] * token_grid[1], hidden.shape[-1])
        read = reader.read_raster(tokens, prepared, token_grid=token_grid, feature_grid=prepared.feature_grid)
        read = read.flatten(0, 1)
        if len(positions) <= MOST_ROWS:
            return write_update(rows, positions, read, out.weight, out.bias).view_as(hidden)
        return add_update(rows, positions, out(read)).view_as(hidden)

    def _cast_features(self, features: Features) -> Features:
        return self._cast(features) if isinstance(features, Tensor) else [self._cast(level) for level in features]

    def _cast(self, x: Tensor) -> Tensor:
        own = self.norm.weight if isinstance(self.norm, nn.RMSNorm) else next(self.parameters())
        return x.to(own.dtype)


def read_by_kernels(blocks: Sequence[nn.Module], device: torch.device) -> bool:
    """Whether one of the blocks reads cells on this device by kernels of ours."""
    readers = [block.interaction for block in blocks if type(block) is VisionRemember]
    own = [reader for reader in readers if type(reader) is SELA]
    return any(reader.reads_rasters(device, next(reader.parameters()).dtype) for reader in own)


def prepare_together(
    blocks: Sequence[nn.Module],
    features: Sequence[Tensor],
    *,
    feature_grid: Grid,
    token_grid: Grid,
    saliency: Tensor | None = None,
) -> list[Any]:
    """What each block needs of an image, the parts that they share made once.

    Cells are ordered and normalised alike for all blocks. Without gradients keys and values are made as well; with them
    that is left to each block's own call, which may be recomputed or sharded.

    Args:
        blocks: those that will read the image.
        features: one (B, H*W, c) per level.
        feature_grid: (H, W).
        token_grid: (h, w).
        saliency: (B, H*W), or None.

    Returns:
        For each block what its forward takes for ``features``; None where it has to be given the levels: a stranger, an
        interaction without regions, weights that are elsewhere or in shards, features that learn.
    """
    learning = torch.is_grad_enabled()
    prepared: list[Any] = [None] * len(blocks)
    if any(level.requires_grad for level in features):
        return prepared
    alike: dict[tuple[Any, ...], dict[int, SELA]] = {}
    for number, block in enumerate(blocks):
        reader = _reader_at_hand(block, features[0].device)
        if reader is not None:
            own_dtype = next(reader.parameters()).dtype
            as_it_lies = reader.reads_rasters(features[0].device, own_dtype)
            alike.setdefault((*reader.arrangement, own_dtype, as_it_lies), {})[number] = reader
    for (*_, dtype, as_it_lies), readers in alike.items():
        own = list(readers.values())
        cast = [level.to(dtype) for level in features]
        made: list[Any]
        if as_it_lies:
            raster = own[0].raster_cells(cast, saliency, feature_grid=feature_grid)
            # The bank of weights that stand side by side has no gradients.
            made = [raster] * len(readers) if learning else SELA.project_rasters(own, raster)
        else:
            cells = own[0].region_cells(
                cast,
                None if saliency is None else saliency.to(dtype, memory_format=torch.contiguous_format),
                feature_grid=feature_grid,
                token_grid=token_grid,
            )
            if cells is None:
                continue
            made = [cells] * len(readers) if learning else SELA.project_together(own, cells)
        for number, own_part in zip(readers, made, strict=True):
            prepared[number] = own_part
    return prepared


def lay_weights_side_by_side(blocks: Sequence[VisionRemember]) -> None:
    """Lets :func:`prepare_together` make the keys and values of all blocks by one product. For new blocks only."""
    own = [block.interaction.bankable if type(block.interaction) is SELA else [] for block in blocks]
    if all(own):
        lay_side_by_side([weight for weights in own for weight in weights])
        for block in blocks:
            for name in ("vr_key", "vr_value"):
                block.interaction.get_submodule(name).register_state_dict_post_hook(save_apart)


def _reader_at_hand(block: nn.Module, device: torch.device) -> SELA | None:
    """The interaction of a block that reads regions and whose weights can be used ahead of its own call."""
    if type(block) is not VisionRemember or "forward" in block.__dict__ or type(block.interaction) is not SELA:
        return None
    if block.interaction._forward_pre_hooks or block.interaction._forward_hooks:
        return None  # hooks are to see what the call documents: the levels
    if not any(weight.ndim > 1 for weight in block.interaction.vr_key.parameters()):
        return None  # the shards of FSDP's first version are flat, or stand in one parameter outside of the block
    # Also those that only the block's own call reads: `rewrite` reads them past their modules.
    return block.interaction if all(_is_at_hand(p, device) for p in block.parameters()) else None


def _is_at_hand(parameter: Tensor, device: torch.device) -> bool:
    """Whether a parameter is whole, which in shards it is not, and on this device, which offloaded it is not."""
    whole = isinstance(parameter, nn.Parameter) and not hasattr(parameter, "device_mesh")
    return whole and parameter.device == device and parameter.numel() > 0  # those of DeepSpeed leave nothing
