"""Phi's decoder."""

from vision_remember.adapters.spec import DecoderSpec

PHI = DecoderSpec(model_type="phi")
