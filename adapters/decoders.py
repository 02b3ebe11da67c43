"""The table of decoders that the tests build hosts with.

All have their layers where :class:`DecoderSpec` says by default, and so may one that is not named here.
"""

from __future__ import annotations

from vision_remember.adapters.spec import DecoderSpec
from vision_remember.registry import Registry

_TESTED = (
    *("cohere", "cohere2", "gemma2", "gemma3_text", "llama", "mistral", "phi", "phi3"),
    *("qwen2", "qwen3", "smollm3"),
)

DECODERS: Registry[DecoderSpec] = Registry(
    "decoder", {model_type: DecoderSpec(model_type=model_type) for model_type in _TESTED}
)
