"""What a tap captured of one run of an encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vision_remember.arrangement import Arrangement
from vision_remember.grid import Grid


@dataclass(frozen=True)
class CapturedGroup:
    """What was captured of the tiles of one size.

    Attributes:
        numbers: the tiles' places among all tiles of the run.
        grid: (H, W).
        levels: one (T, H*W, C) per level in the order asked for.
        saliency: (T, H*W), positive, or None.
    """

    numbers: tuple[int, ...]
    grid: Grid
    levels: tuple[Tensor, ...]
    saliency: Tensor | None

    def joined(self) -> Tensor:
        """(T, H*W, levels*C), the levels joined on channels (Vision Remember, section 4.3)."""
        return torch.cat(self.levels, dim=-1)


@dataclass
class Awaited:
    """A block whose queries and keys are waited for.

    Attributes:
        block: the block.
        hidden: its input.
        made: what its projections returned so far.
    """

    block: nn.Module
    hidden: Tensor
    made: dict[nn.Module, Tensor] = field(default_factory=dict)


@dataclass
class Captured:
    """What one run of the encoder left. Empty until the encoder has run.

    Where images have grids of their own (Qwen-VL, Pixtral, SigLIP 2), read :attr:`groups`; the other attributes are for
    tiles of one size.

    Attributes:
        output: what the encoder returned.
    """

    _levels: tuple[int, ...]
    output: Any = None
    # As the blocks returned them. They are cut up only when asked for: what runs inside a checkpointed block must save
    # no tensors that the block saves not when it is run again.
    _hidden: dict[int, Tensor] = field(default_factory=dict)
    _saliency: list[Tensor] | None = None
    # While the block that tells the saliency runs and has not projected.
    _awaited: Awaited | None = None
    _arrangement: Arrangement | None = None
    _arguments: dict[str, Any] = field(default_factory=dict)
    _patch_grid: Grid | None = None

    @property
    def empty(self) -> bool:
        """Whether the encoder has not run."""
        return not self._hidden

    @property
    def groups(self) -> list[CapturedGroup]:
        """The tiles by size."""
        missing = [level for level in self._levels if level not in self._hidden]
        if missing or self._arrangement is None:
            raise RuntimeError(f"levels {missing} were not captured: run the encoder inside capture()")
        levels = [self._arrangement.split(self._hidden[level]) for level in self._levels]
        return [
            CapturedGroup(
                group.numbers,
                group.grid,
                tuple(level[place] for level in levels),
                None if self._saliency is None else self._saliency[place],
            )
            for place, group in enumerate(self._arrangement.groups)
        ]

    @property
    def levels(self) -> list[Tensor]:
        """The features, one (B, H*W, C) per level in the order asked for, prefix tokens removed, raster order."""
        return list(self._only().levels)

    @property
    def grid(self) -> Grid:
        """(H, W) of the features."""
        return self._only().grid

    @property
    def saliency(self) -> Tensor | None:
        """(B, H*W), positive, without gradient; None if not asked for."""
        return None if self._saliency is None else self._only().saliency

    def joined(self) -> Tensor:
        """(B, H*W, levels*C), the levels joined on channels (Vision Remember, section 4.3)."""
        return self._only().joined()

    def forget(self) -> None:
        """Makes room for another run of the encoder."""
        self._hidden, self._saliency, self._awaited, self._arrangement = {}, None, None, None

    def _only(self) -> CapturedGroup:
        groups = self.groups
        if len(groups) > 1:
            sizes = ", ".join(f"{height}x{width}" for height, width in (group.grid for group in groups))
            raise RuntimeError(f"the images have different grids ({sizes}): read .groups, which holds them by size")
        return groups[0]
