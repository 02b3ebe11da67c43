"""What a model looks at and what it keeps: the maths, on plain tensors.

The functions that take a model stand at the top of the library, as ``vision_remember.attention_density`` does.
"""

from vision_remember.analysis.attention_density import AttentionDensity, TokenGroups, density, token_groups

__all__ = ["AttentionDensity", "TokenGroups", "density", "token_groups"]
