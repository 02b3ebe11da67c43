"""The table of decoders."""

from vision_remember.adapters.gemma2 import GEMMA2
from vision_remember.adapters.llama import LLAMA
from vision_remember.adapters.mistral import MISTRAL
from vision_remember.adapters.phi import PHI
from vision_remember.adapters.phi3 import PHI3
from vision_remember.adapters.qwen2 import QWEN2
from vision_remember.adapters.qwen3 import QWEN3
from vision_remember.adapters.spec import DecoderSpec
from vision_remember.registry import Registry

DECODERS: Registry[DecoderSpec] = Registry(
    "decoder", {spec.model_type: spec for spec in (GEMMA2, LLAMA, MISTRAL, PHI, PHI3, QWEN2, QWEN3)}
)
