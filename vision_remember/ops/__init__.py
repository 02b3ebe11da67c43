"""Tensor operations: no modules, no configuration."""

from vision_remember.ops.local_attention import BACKENDS, local_attention
from vision_remember.ops.naive import naive_local_attention
from vision_remember.ops.regions import region_bias

__all__ = ["BACKENDS", "local_attention", "naive_local_attention", "region_bias"]
