"""Qwen3's decoder."""

from vision_remember.adapters.spec import DecoderSpec

QWEN3 = DecoderSpec(model_type="qwen3")
