"""How the default configuration of each host is made small: numbers for all, and what some need of their own."""

from __future__ import annotations

from typing import Any

IMAGE_TOKEN = 190
WIDTH = 64

TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Numbers of a language model."""
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "depth": 4,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "out_hidden_size": WIDTH,
}
"""Numbers of a vision encoder."""


def shrink(config: Any, table: dict[str, Any]) -> None:
    """Sets the numbers that a configuration has; pairs stay pairs."""
    for name, value in table.items():
        old = getattr(config, name, None)
        if name.endswith("token_id") and hasattr(config, name):
            setattr(config, name, value)
        elif isinstance(old, (list, tuple)):
            setattr(config, name, [value] * len(old))
        elif isinstance(old, int) and not isinstance(old, bool):
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[: config.num_hidden_layers]


def _each(model_types: tuple[str, ...], values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {model_type: dict(values) for model_type in model_types}


def small_rope(text: Any) -> None:
    """Sections of a rotary embedding in three directions, for heads of 16."""
    rope = getattr(text, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        text.rope_parameters = {**rope, "mrope_section": [4, 2, 2], "partial_rotary_factor": 1.0}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN_VISION = {**VISION, "hidden_size": 32, "num_position_embeddings": 64}
_MLA = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 16}
_AUDIO = {
    "audio_config.encoder_layers": 1,
    "audio_config.encoder_attention_heads": 2,
    "audio_config.encoder_ffn_dim": 32,
    "audio_config.d_model": 32,
    "audio_config.output_dim": WIDTH,
}
GIVEN: dict[str, dict[str, Any]] = {
    "chameleon": {
        **TEXT,
        "vocabulary_map": {"<image>": IMAGE_TOKEN, "IMGIMGAZ": 10, "IMGIMGBZ": 11},
        "vq_config": {"base_channels": 32, "num_embeddings": 16, "resolution": 32},
    },
    "emu3": {
        "text_config": TEXT,
        "vocabulary_map": {"<image>": IMAGE_TOKEN, "<|extra_200|>": 12, "<|visual token 000000|>": 10},
        "vq_config": {"base_channels": 32, "codebook_size": 16},
    },
    "deepseek_ocr2": {
        "text_config": {**TEXT, "num_experts_per_tok": 2, "mlp_layer_types": ["dense"] * 4},
        "vision_config": {
            "sam_config": {
                **VISION,
                "output_channels": 16,
                "downsample_channels": [16, 32],
                "mlp_dim": 48,
                "scale": 8,
                "image_size": 128,
                "initializer_range": 0.02,
            },
            "encoder_config": {**TEXT, "hidden_size": 32},
        },
    },
    "unlimited_ocr": {
        "text_config": {**TEXT, "mlp_layer_types": ["dense"] * 4, "layer_types": ["full_attention"] * 4},
        "vision_config": {
            "sam_config": {
                **VISION,
                "output_channels": 16,
                "downsample_channels": [16, 32],
                "mlp_dim": 48,
                "image_size": 128,
                "initializer_range": 0.02,
            },
            "encoder_config": {**VISION},
        },
    },
    "granite4_vision": {
        "text_config": {**TEXT, "model_type": "granite"},
        "vision_config": {**VISION, "hidden_size": 64, "model_type": "siglip_vision_model"},
        "deepstack_layer_map": [[-1, 0]],
        "spatial_vision_layer": -1,
        "spatial_target_layers": [1],
        "downsample_rate": "4/8",
        "qformer_config": {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "encoder_hidden_size": 32,
        },
    },
    "kimi_k25": {
        "text_config": {**TEXT, **_MLA, "head_dim": 8, "num_key_value_heads": 4},
        "vision_config": {**VISION, "pos_emb_height": 8, "pos_emb_width": 8},
    },
    "nemotron_h_omni": {
        "text_config": {**TEXT, "layers_block_type": ["full_attention", "mlp"] * 2},
        "vision_config": {
            **VISION,
            "max_img_size": 64,
            "patch_dim": 48,
            "video_temporal_patch_size": 2,
            "video_patch_dim": 96,
            "num_cls_tokens": 3,
            "num_registers": 2,
            "summary_idxs": [0, 1],
        },
    },
    "gemma4": {
        "text_config": {**TEXT, "hidden_size_per_layer_input": 0},
        "vision_config": {**VISION, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 64},
    },
    "gemma4_unified": {"text_config": TEXT, "vision_config": VISION},
    "diffusion_gemma": {
        "text_config": {**TEXT, "top_k_experts": 2},
        "vision_config": {**VISION, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 64},
    },
    "dots3_note": {
        "text_config": {
            **TEXT,
            **_MLA,
            "num_key_value_heads": 4,
            "index_topk": 512,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "shared_experts_intermediate_size": 32,
            "layer_types": ["sliding_attention"] * 4,
            "per_layer_config": {},
        },
        "vision_config": {
            **VISION,
            "moe_intermediate_size": 32,
            "adapter_in_dim": 32,
            "adapter_merge_size": 2,
            "adapter_out_dim": WIDTH,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense"] * 4,
            "per_layer_config": {},
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "downsample_hidden_size": 8,
            "adapter_input_size": 32,
            "adapter_out_dim": WIDTH,
        },
    },
    "step3p7": {
        "text_config": {
            **TEXT,
            "sliding_window": 64,
            "share_expert_dim": 32,
            "num_sliding_attention_heads": 4,
            "query_pre_attn_scalar": 16,
            "layer_types": ["full_attention"] * 4,
        }
    },
    "mistral_large4": {
        "text_config": {
            **TEXT,
            **_MLA,
            "head_dim": 8,
            "num_key_value_heads": 4,
            "index_topk": 512,
            "index_head_dim": 16,
            "index_n_heads": 2,
        }
    },
    "glm5_next": {
        "text_config": {
            **TEXT,
            **_MLA,
            "qk_rope_head_dim": 0,
            "qk_nope_head_dim": 16,
            "num_key_value_heads": 4,
            "head_dim": 0,
            "index_topk": 512,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "hc_mult": 2,
            "index_kpool": 4,
        }
    },
    "cohere_compass": {
        "text_config": {
            **TEXT,
            "layer_types": ["full_attention"] * 4,
            "rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [4, 2, 2]}},
        },
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [1, 2]},
    },
    "hunyuan_vl": {
        "text_config": {**TEXT, "rope_parameters": _ROPE},
        "vision_config": {**VISION, "text_hidden_size": WIDTH},
    },
    "qwen4_exp": {
        "text_config": {
            **TEXT,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 1,
            "hc_count": 2,
            "hc_lowrank": 8,
            "rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]},
        },
        "vision_config": _QWEN_VISION,
    },
    "inkling2": {
        "text_config": {
            **TEXT,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "unpadded_vocab_size": 200,
            "d_rel": 4,
            "rel_extent": 64,
        },
        "vision_config": {**VISION, "text_hidden_size": WIDTH, "projection_hidden_dim": 64, "posemb_grid_size": 8},
    },
    "minimax_m3_vl": {
        "text_config": {
            **TEXT,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 32,
            "rotary_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
        },
        "vision_config": VISION,
        "projector_hidden_size": WIDTH,
        "merged_hidden_size": 4 * WIDTH,
    },
    "muse_glimmer": {
        "text_config": TEXT,
        "vision_config": {**VISION, "pos_emb_height": 8, "pos_emb_width": 8},
        "out_hidden_size": 128,
        "projector_hidden_size": 64,
    },
    "muse_spark": {
        "text_config": {**TEXT, "moe_hidden_size": 32},
        "vision_config": {**VISION, "pos_emb_height": 8, "pos_emb_width": 8},
        "out_hidden_size": 128,
        "projector_hidden_size": 64,
        "audio_config": {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "out_hidden_size": WIDTH},
    },
}
"""Arguments of the configuration, where its parts follow from one another; a part given here is not shrunk."""

OWN: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {64: 16}},
    **_each(("gemma3", "shieldgemma2"), {"mm_tokens_per_image": 16}),
    **_each(("internvl", "qianfan_ocr"), {"image_seq_length": 16}),
    "llama4": {
        "vision_config.vision_output_dim": WIDTH,
        "vision_config.projector_input_dim": WIDTH,
        "vision_config.projector_output_dim": WIDTH,
        "vision_config.intermediate_size": 128,
    },
    "vipllava": {"vision_feature_layers": [-2, -3]},
    "idefics2": {
        "perceiver_config.hidden_size": WIDTH,
        "perceiver_config.num_key_value_heads": 2,
        "perceiver_config.resampler_n_latents": 8,
        "perceiver_config.resampler_depth": 2,
        "perceiver_config.resampler_n_heads": 4,
        "perceiver_config.resampler_head_dim": 16,
    },
    **_each(
        ("mistral3", "lighton_ocr", "mistral_large4"), {"vision_config.head_dim": 8, "vision_config.image_size": 128}
    ),
    "deepseek_vl_hybrid": {
        **{f"high_res_vision_config.{name}": value for name, value in VISION.items()},
        "high_res_vision_config.output_channels": 16,
        "high_res_vision_config.image_size": 64,
    },
    "janus": {
        "vision_config.projection_dim": WIDTH,
        "vq_config.base_channels": 32,
        "vq_config.projection_dim": WIDTH,
        "vq_config.image_token_embed_dim": WIDTH,
        "vq_config.num_embeddings": 64,
    },
    "kimi_k25": {"projection_hidden_size": 32},
    "ovis2": {"vision_config.vocab_size": 64, "vision_config.hidden_stride": 2, "hidden_size": WIDTH},
    "paligemma": {"projection_dim": WIDTH, "vision_config.projection_dim": WIDTH},
    "qwen2_vl": {"vision_config.hidden_size": WIDTH},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 2, 4]}},
    **_each(("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni"), {"vision_config.deepstack_visual_indexes": [1, 2]}),
    "qwen2_5_omni_thinker": {**_AUDIO, "vision_start_token_id": 160},
    "qwen3_omni_moe_thinker": {
        **_AUDIO,
        "audio_config.downsample_hidden_size": 8,
        "vision_start_token_id": 160,
        "vision_config.deepstack_visual_indexes": [1, 2],
    },
    # By default these encoders merge cells between their blocks.
    **_each(("minicpmv4_6", "minicpmv4_7"), {"downsample_mode": "4x"}),
    "nemotron_h_omni": {"vision_hidden_size": 32, "projector_hidden_size": 32},
    # So small by default that images do not matter.
    **_each(("got_ocr2", "pp_chart2table"), {"vision_config.initializer_range": 0.02}),
    **_each(("llava_next", "llava_next_video", "llava_onevision"), {"image_grid_pinpoints": [[32, 64], [64, 32]]}),
    "granite4_vision": {"image_grid_pinpoints": [[32, 64], [64, 32]], "vision_feature_select_strategy": "full"},
}
"""Values by path, set on the shrunk default configuration."""
