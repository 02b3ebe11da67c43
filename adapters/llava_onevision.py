"""LLaVA-OneVision: tiles stitched as in LLaVA-NeXT, large images shrunk, the frames of a video pooled."""

from vision_remember.adapters.spec import MLLMSpec

LLAVA_ONEVISION = MLLMSpec(name="llava_onevision", feature_levels="config.vision_feature_layer")
