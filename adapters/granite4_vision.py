"""Granite 4 Vision: tiles as in LLaVA-NeXT, and several projections of them, each added in front of a decoder layer.

The projections are of windows; a token is taken to stand for the cells in its place of the window.
"""

from vision_remember.adapters.spec import MLLMSpec, TokenGeometry

GRANITE4_VISION = MLLMSpec(
    name="granite4_vision",
    projector="model.layerwise_projectors.0",
    geometry=TokenGeometry(cells=(2, 2)),
)
