"""LLaMA's decoder."""

from vision_remember.adapters.spec import DecoderSpec

LLAMA = DecoderSpec(model_type="llama")
