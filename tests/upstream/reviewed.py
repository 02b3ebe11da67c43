"""What was looked at and is accepted, each with its reason. An entry that no longer happens fails the run."""

from __future__ import annotations

LEFT_OUT = {
    "test_generation_tester_mixin_inheritance": "looks for the common tests of generate(), which are not shipped",
}
"""Tests that are not run, on any host."""

DIFFERENCES = {
    "test_model_weights_reload_no_missing_tied_weights": (
        "wants every parameter reported as missing from an empty file; the blocks come after from_pretrained, their "
        "weights from load_vision_remember"
    ),
}
"""Tests that pass on a plain host and not on an attached one, on every host."""

_VISION_BATCH = "adapters of the vision encoder get one sample per tile, not one per row of the batch"
_END = "reads an end token from the outer configuration, which has none"
_NARROW = "combines adapters to rank 20; the value projection of the tiny hosts is 16 wide"

FAIL_ALONE: dict[str, dict[str, str]] = {
    "llava": {
        "test_generate_with_mixed_adapter_batches_and_beam_search_lora": _VISION_BATCH,
        "test_weighted_combination_of_adapters_lora": _NARROW,
    },
    "internvl": {
        "test_generate_with_mixed_adapter_batches_and_beam_search_lora": _VISION_BATCH,
        **{
            f"test_safe_merge_{kind}": "weights that the host shares are not declared as tied when it is saved"
            for kind in ("ia3", "loha", "lora")
        },
        "test_weighted_combination_of_adapters_lora": _NARROW,
    },
    "qwen3_vl": {
        "test_generate_with_mixed_adapter_batches_and_beam_search_lora": _END,
        "test_weighted_combination_of_adapters_lora": _NARROW,
    },
}
"""Tests that fail on the plain host, by host; on the attached one they fail too."""
