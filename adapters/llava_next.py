"""LLaVA-NeXT: a base tile and further tiles per image, stitched, without padding, a newline after each row."""

from vision_remember.adapters.spec import MLLMSpec

LLAVA_NEXT = MLLMSpec(name="llava_next", feature_levels="config.vision_feature_layer")
