"""The vision towers of Qwen-VL: patches of all images in one sequence, block by block, in 2.5 also window by window.

No CLS token, rotary positions: the saliency map is each patch's mean attention logit without the rotation.
"""

from vision_remember.encoder import EncoderSpec

QWEN2_VIT = EncoderSpec(
    name="qwen2_vit",
    classes=("Qwen2VisionTransformerPretrainedModel", "Qwen3VLVisionModel", "Qwen3_5VisionModel"),
    layers="blocks",
    order="blocks",
    sizes="grid_thw",
    merge="spatial_merge_size",
    norm="norm1",
    fused="attn.qkv",
    num_heads="attn.num_heads",
)

QWEN2_5_VIT = EncoderSpec(
    name="qwen2_5_vit",
    classes=("Qwen2_5_VisionTransformerPretrainedModel",),
    layers="blocks",
    order="windows",
    sizes="grid_thw",
    merge="spatial_merge_size",
    window_size="window_size",
    patch_size="patch_size",
    norm="norm1",
    fused="attn.qkv",
    num_heads="attn.num_heads",
)
