"""Mistral's decoder."""

from vision_remember.adapters.spec import DecoderSpec

MISTRAL = DecoderSpec(model_type="mistral")
