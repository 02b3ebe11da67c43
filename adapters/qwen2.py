"""Qwen2's decoder."""

from vision_remember.adapters.spec import DecoderSpec

QWEN2 = DecoderSpec(model_type="qwen2")
