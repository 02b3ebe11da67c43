"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, the frames of a video pooled before the projector."""

from vision_remember.adapters.spec import MLLMSpec

LLAVA_NEXT_VIDEO = MLLMSpec(name="llava_next_video", feature_levels="config.vision_feature_layer")
