"""Vision Remember: few vision tokens that re-read the image between the layers of a multimodal language model.

The core needs torch alone. The names that know transformers are looked up when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vision_remember.config import PRESETS, VisionRememberConfig
from vision_remember.interactions import FUSIONS, INTERACTIONS, SELA, build_interaction
from vision_remember.ops import local_attention
from vision_remember.projectors import PROJECTORS, build_projector
from vision_remember.pruning import PRUNERS
from vision_remember.remember import VisionRemember
from vision_remember.saliency import cls_saliency
from vision_remember.tap import MultiLevelTap

if TYPE_CHECKING:
    from vision_remember.adapters import (
        MLLMSpec,
        attach_pruner,
        attach_vision_remember,
        attention_density,
        compress_projector,
        detach_vision_remember,
        forgetting_curve,
        load_vision_remember,
        region_attention,
        saliency_map,
        write_report,
    )
    from vision_remember.adapters.llava_vr import build_llava_vr

__version__ = "0.1.0"

_FROM_ADAPTERS = (
    "MLLMSpec",
    "attach_pruner",
    "attach_vision_remember",
    "attention_density",
    "compress_projector",
    "detach_vision_remember",
    "forgetting_curve",
    "load_vision_remember",
    "region_attention",
    "saliency_map",
    "write_report",
)

__all__ = [
    "FUSIONS",
    "INTERACTIONS",
    "PRESETS",
    "PROJECTORS",
    "PRUNERS",
    "SELA",
    "MLLMSpec",
    "MultiLevelTap",
    "VisionRemember",
    "VisionRememberConfig",
    "attach_pruner",
    "attach_vision_remember",
    "attention_density",
    "build_interaction",
    "build_llava_vr",
    "build_projector",
    "cls_saliency",
    "compress_projector",
    "detach_vision_remember",
    "forgetting_curve",
    "load_vision_remember",
    "local_attention",
    "region_attention",
    "saliency_map",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _FROM_ADAPTERS:
        return getattr(importlib.import_module("vision_remember.adapters"), name)
    if name == "build_llava_vr":  # a module that imports half of transformers
        return importlib.import_module("vision_remember.adapters.llava_vr").build_llava_vr
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
