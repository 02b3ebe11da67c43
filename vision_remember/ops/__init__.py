"""Tensor operations: no modules, no configuration."""

from vision_remember.ops.deformable import deformable_sample
from vision_remember.ops.local_attention import BACKENDS, local_attention
from vision_remember.ops.naive import naive_local_attention
from vision_remember.ops.regions import region_bias
from vision_remember.ops.voco import voco_mask

__all__ = ["BACKENDS", "deformable_sample", "local_attention", "naive_local_attention", "region_bias", "voco_mask"]
