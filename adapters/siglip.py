"""SigLIP's vision tower: no CLS token; where the pooling head was kept, its probe can stand in for one."""

from vision_remember.encoder import EncoderSpec

SIGLIP = EncoderSpec(
    name="siglip",
    classes=("SiglipVisionModel",),
    layers="encoder.layers",
    patch_embedding="embeddings.patch_embedding",
    norm="layer_norm1",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    num_heads="self_attn.num_heads",
    image_size="config.image_size",
    pooling_head="head",
)
