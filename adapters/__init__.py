"""What Vision Remember knows of other libraries: decoders, encoders, hosts, and how to attach to them."""

# a checkout root on sys.path would import this folder a second time, with a second set of tables
if __name__ != "vision_remember.adapters":
    raise ImportError(f"import this folder as vision_remember.adapters, not as {__name__!r}")

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
from vision_remember.adapters.spec import DecoderSpec, MLLMSpec

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
]
