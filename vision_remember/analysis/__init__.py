"""What a model looks at and what it keeps: the maths, on plain tensors.

The functions that take a model stand at the top of the library, as ``vision_remember.attention_density`` does.
"""

from vision_remember.analysis.attention_density import AttentionDensity, TokenGroups, density, token_groups
from vision_remember.analysis.forgetting import ForgettingCurve, linear_probe
from vision_remember.analysis.overlays import RegionAttention, SaliencyMap, saliency_maps

__all__ = [
    "AttentionDensity",
    "ForgettingCurve",
    "RegionAttention",
    "SaliencyMap",
    "TokenGroups",
    "density",
    "linear_probe",
    "saliency_maps",
    "token_groups",
]
