"""CLIP's vision tower: a CLS token in front of the patches."""

from vision_remember.encoder import EncoderSpec

CLIP = EncoderSpec(
    name="clip",
    classes=("CLIPVisionModel",),
    layers="encoder.layers",
    patch_embedding="embeddings.patch_embedding",
    prefix_tokens=1,
    cls_token=0,
    norm="layer_norm1",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    num_heads="self_attn.num_heads",
    image_size="config.image_size",
)
