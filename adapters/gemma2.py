"""Gemma 2's decoder."""

from vision_remember.adapters.spec import DecoderSpec

GEMMA2 = DecoderSpec(model_type="gemma2")
