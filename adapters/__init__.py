"""What Vision Remember knows of other libraries: decoders, encoders, hosts, and how to attach to them.

The names are looked up when they are first used: whoever needs one module of this folder does not load all of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# a checkout root on sys.path would import this folder a second time, with a second set of tables
if __name__ != "vision_remember.adapters":
    raise ImportError(f"import this folder as vision_remember.adapters, not as {__name__!r}")

if TYPE_CHECKING:
    from vision_remember.adapters.analysis import attention_density
    from vision_remember.adapters.attach import attach_vision_remember, detach_vision_remember
    from vision_remember.adapters.compress import CompressionHandle, compress_projector
    from vision_remember.adapters.decoders import DECODERS
    from vision_remember.adapters.encoders import ENCODERS, encoder_spec
    from vision_remember.adapters.handle import VisionRememberHandle
    from vision_remember.adapters.hosts import HOSTS
    from vision_remember.adapters.load import load_vision_remember
    from vision_remember.adapters.overlays import forgetting_curve, region_attention, saliency_map
    from vision_remember.adapters.pruner import PrunerHandle, attach_pruner
    from vision_remember.adapters.report import write_report
    from vision_remember.adapters.spec import DecoderSpec, MLLMSpec

_MODULES = {
    "DECODERS": "decoders",
    "ENCODERS": "encoders",
    "HOSTS": "hosts",
    "CompressionHandle": "compress",
    "DecoderSpec": "spec",
    "MLLMSpec": "spec",
    "PrunerHandle": "pruner",
    "VisionRememberHandle": "handle",
    "attach_pruner": "pruner",
    "attach_vision_remember": "attach",
    "attention_density": "analysis",
    "compress_projector": "compress",
    "detach_vision_remember": "attach",
    "encoder_spec": "encoders",
    "forgetting_curve": "overlays",
    "load_vision_remember": "load",
    "region_attention": "overlays",
    "saliency_map": "overlays",
    "write_report": "report",
}

__all__ = [
    "DECODERS",
    "ENCODERS",
    "HOSTS",
    "CompressionHandle",
    "DecoderSpec",
    "MLLMSpec",
    "PrunerHandle",
    "VisionRememberHandle",
    "attach_pruner",
    "attach_vision_remember",
    "attention_density",
    "compress_projector",
    "detach_vision_remember",
    "encoder_spec",
    "forgetting_curve",
    "load_vision_remember",
    "region_attention",
    "saliency_map",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
