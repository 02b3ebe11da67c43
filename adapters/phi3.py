"""Phi-3's decoder."""

from vision_remember.adapters.spec import DecoderSpec

PHI3 = DecoderSpec(model_type="phi3")
