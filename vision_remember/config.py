"""What a Vision Remember adapter is made of, as plain frozen data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from vision_remember.grid import Grid, check_count, check_grid
from vision_remember.registry import Registry, did_you_mean
from vision_remember.typed import check_fields

SaliencySource = Literal["auto", "cls", "received", "map_head"]

_PAIRS = ("token_grid", "cells")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "position": ("specialised", "learned", "none"),
    "feature_norm": ("per_level", "joint", "none"),
    "token_mixer": ("self", "text_guided", None),
    "absorb": (True, False, "auto"),
    "query_layers": (1, 2),
    "output_layers": (1, 2),
    "saliency": ("auto", "cls", "received", "map_head", None),
    "saliency_center": ("none", "mean", "zscore"),
}
_INTERACTION_FIELDS = (
    *("attn_dim", "num_heads", "num_points", "window", "position", "cells"),
    *("fusion", "feature_norm", "query_layers", "output_layers", "inner_projections", "zero_init", "absorb"),
)


@dataclass(frozen=True, kw_only=True)
class VisionRememberConfig:
    """Choices of a Vision Remember adapter. None means: derived from the host when attached.

    Attributes:
        layers: 0-based decoder layers before which a block runs; (1, 4) = after the first and fourth layer, the
            paper's choice.
        levels: encoder ``hidden_states`` indices whose features are kept; None for the paper's 13, 18, 23 of 24,
            scaled to the encoder's depth.
        interaction: an entry of ``INTERACTIONS``.
        attn_dim: width of the attention; "features" for the width of the joined levels.
        num_heads: attention heads.
        num_points: places that deformable attention samples per head and level.
        window: side of the block of tokens that share a region.
        position: "specialised", "learned" or "none"; see :class:`vision_remember.SELA`.
        cells: cells per token that the position bias is laid out for.
        fusion: an entry of ``FUSIONS``: how the levels of a cell are joined.
        feature_norm: "per_level", "joint" or "none".
        query_layers: linear layers of the query projection, 1 or 2.
        output_layers: linear layers of the output projection, 1 or 2.
        inner_projections: the attention has linear maps of its own behind the query projection and before the output
            projection.
        zero_init: start as an exact identity.
        absorb: whether projections of cells are drawn to the other side of their products, which changes the time and
            not the function; see :class:`vision_remember.SELA`.
        token_mixer: None; "self", vision tokens look at each other after the read; "text_guided", at a token made of
            the text as well; see :class:`vision_remember.interactions.TokenMixer`.
        saliency: where the map comes from: "cls" (the CLS token's attention), "received" (the mean attention logit
            that a patch receives), "map_head" (the probe of a SigLIP pooling head), "auto" (the first of "cls" and
            "received" that the encoder has), or None.
        saliency_level: ``hidden_states`` index whose block's attention is used; None for the deepest level.
        saliency_variant: an entry of ``SALIENCY_VARIANTS``.
        saliency_center: "none", "mean" or "zscore"; see :func:`vision_remember.cls_saliency`.
        saliency_temperature: divides the logits.
        token_grid: (rows, columns) of an image's vision tokens; None asks the projector.
    """

    layers: tuple[int, ...] = (1, 4)
    levels: tuple[int, ...] | None = None
    interaction: str = "sela"
    attn_dim: int | Literal["features"] | None = None
    num_heads: int | None = None
    num_points: int | None = None
    window: int = 1
    position: Literal["specialised", "learned", "none"] = "specialised"
    cells: Grid | None = None
    fusion: str = "concat"
    feature_norm: Literal["per_level", "joint", "none"] = "per_level"
    query_layers: Literal[1, 2] = 1
    output_layers: Literal[1, 2] = 1
    inner_projections: bool = False
    zero_init: bool = True
    absorb: bool | Literal["auto"] = False
    token_mixer: Literal["self", "text_guided"] | None = None
    saliency: SaliencySource | None = "auto"
    saliency_level: int | None = None
    saliency_variant: str = "boost"
    saliency_center: Literal["none", "mean", "zscore"] = "mean"
    saliency_temperature: float = 1.0
    token_grid: Grid | None = None

    def __post_init__(self) -> None:
        # JSON knows lists only.
        for name in ("layers", "levels", *_PAIRS):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        _check_indices("layers", self.layers)
        if min(self.layers) < 0:
            raise ValueError(f"layers={list(self.layers)}: expected 0-based decoder layers, none negative")
        if self.levels is not None:
            _check_indices("levels", self.levels)
        for name in _PAIRS:
            if getattr(self, name) is not None:
                check_grid(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, choices))}")
        for name in ("attn_dim", "num_heads", "num_points", "window"):
            if getattr(self, name) not in (None, "features"):
                check_count(name, getattr(self, name))
        if not isinstance(self.saliency_level, (int, type(None))):
            raise ValueError(f"saliency_level={self.saliency_level!r}: expected a hidden_states index or None")
        if not isinstance(self.saliency_temperature, (int, float)) or not 0 < self.saliency_temperature < math.inf:
            raise ValueError(f"saliency_temperature={self.saliency_temperature!r}: expected a positive number")
        check_fields(self)

    @classmethod
    def from_preset(cls, name: str = "default", **overrides: Any) -> VisionRememberConfig:
        """A preset with some fields replaced.

        "default" starts as an exact identity and trains from there. "paper" is the paper as printed, its silences
        filled with our readings: see :data:`PRESETS`.

        Raises:
            ValueError: an unknown preset or field; the message suggests the closest one.
        """
        return cls.from_dict({**PRESETS[name], **overrides})

    def replace(self, **changes: Any) -> VisionRememberConfig:
        """A copy with some fields replaced; raises ValueError for an unknown field."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VisionRememberConfig:
        """The inverse of :meth:`to_dict`; raises ValueError for an unknown field or what has no fields."""
        if not isinstance(data, dict):
            raise ValueError(f"{data!r}: expected the fields of a VisionRememberConfig")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in data:
            if name not in known:
                raise ValueError(f"VisionRememberConfig has no field {name!r}: {did_you_mean(name, known)}")
        return cls(**data)

    def to_json(self) -> str:
        """The fields as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> VisionRememberConfig:
        """The inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))

    def interaction_options(self, known: Collection[str]) -> dict[str, Any]:
        """The fields that go to the constructor of the interaction.

        Args:
            known: the options that the interaction has. Fields that it lacks are left out while nobody set them.

        Raises:
            ValueError: a field was set that the interaction does not have.
        """
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        options = {}
        for name in _INTERACTION_FIELDS:
            value = getattr(self, name)
            if name in known and value is not None:
                options[name] = value
            elif name not in known and value != fields[name] and value != "none":
                raise ValueError(f"{name}={value!r}: interaction {self.interaction!r} has no such option")
        return options


PRESETS: Registry[dict[str, Any]] = Registry(
    "preset",
    {
        "default": {},
        # Printed in the paper: the layers, saliency from the CLS token, values multiplied by it, an MLP on the query,
        # no position bias. Our readings of what it leaves open: an attention as wide as the joined levels with heads of
        # 64, a second MLP on the way back and an ordinary start (both fit the printed size of the smaller model and the
        # printed loss of global attention; the larger model's size takes `inner_projections` as well, as
        # `build_llava_vr` has them), one layer norm over the joined levels, saliency on raw logits.
        "paper": {
            "attn_dim": "features",
            "position": "none",
            "feature_norm": "joint",
            "query_layers": 2,
            "output_layers": 2,
            "zero_init": False,
            "saliency_variant": "logit",
            "saliency_center": "none",
        },
    },
)


def _check_indices(name: str, indices: tuple[int, ...]) -> None:
    if not isinstance(indices, tuple) or not indices or not all(isinstance(i, int) for i in indices):
        raise ValueError(f"{name}={indices!r}: expected at least one whole number, each an int")
    if len(set(indices)) < len(indices):
        raise ValueError(f"{name}={list(indices)}: an index is repeated")
