"""LLaVA: one square tile per image, its tokens in raster order and nothing between them."""

from vision_remember.adapters.spec import MLLMSpec

LLAVA = MLLMSpec(name="llava", plain=True, feature_levels="config.vision_feature_layer")
