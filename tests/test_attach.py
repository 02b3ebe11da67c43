"""Invariant 1: attaching changes nothing but what it adds, detaching takes it all away. And what a forward does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.fingerprint import Fingerprint
from tests.hosts import DECODER_CONFIGS, ENCODER_CONFIGS, IMAGE_TOKEN, PAIRINGS, batch, build_llava, randomise
from vision_remember import attach_vision_remember, compress_projector, detach_vision_remember
from vision_remember.adapters import DECODERS, ENCODERS
from vision_remember.adapters.attach import default_levels
from vision_remember.adapters.attachment import find_attachment

LAYERS = [1, 3]


def logits(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_every_registered_decoder_and_encoder_has_a_test_host() -> None:
    assert set(DECODER_CONFIGS) == set(DECODERS)
    assert set(ENCODER_CONFIGS) == {name for name, spec in ENCODERS.items() if spec.order == "raster"}


@pytest.mark.parametrize(("decoder", "encoder"), PAIRINGS)
def test_attach_is_an_exact_identity_and_detach_leaves_no_trace(decoder: str, encoder: str) -> None:
    model = build_llava(decoder, encoder)
    inputs = batch(model)
    expected = logits(model, **inputs)  # first, since transformers installs hooks of its own in the first call
    before = Fingerprint(model)
    handle = attach_vision_remember(model, LAYERS)
    assert torch.equal(logits(model, **inputs), expected)

    state = model.state_dict()
    assert [name for name in state if "vision_remember" not in name] == list(before.tensors)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.tensors.items())

    randomise(handle)
    assert not torch.allclose(logits(model, **inputs), expected, atol=0.1)
    detach_vision_remember(model)
    before.check(model)
    assert torch.equal(logits(model, **inputs), expected)


@pytest.mark.parametrize(("decoder", "encoder"), PAIRINGS)
@pytest.mark.parametrize("compressed", [False, True], ids=["all tokens", "pooled"])
def test_a_layer_reads_what_a_loop_over_the_images_computes(decoder: str, encoder: str, compressed: bool) -> None:
    """The hidden states in front of the first block's layer, against the block called image by image."""
    model = build_llava(decoder, encoder)
    if compressed:
        compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    handle = attach_vision_remember(model, LAYERS, levels=(2, -1), saliency="received", saliency_center="none")
    randomise(handle)
    inputs = batch(model)
    seen: list[torch.Tensor] = []
    # Registered after ours, so it sees what the layer will see.
    model.model.language_model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with handle.disabled():
        logits(model, **inputs)
    logits(model, **inputs)
    plain, remembered = seen

    tower = model.model.vision_tower
    with torch.no_grad():
        hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    prefix = 1 if encoder == "clip" else 0
    features = torch.cat([hidden[2][:, prefix:], tower_output(tower, inputs["pixel_values"])[:, prefix:]], -1)
    side = int(features.shape[1] ** 0.5)
    attention = tower.encoder.layers[-1].self_attn
    normed = tower.encoder.layers[-1].layer_norm1(hidden[-2])[:, prefix:]
    width = attention.head_dim
    query, key = (p(normed).unflatten(-1, (-1, width)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    saliency = 1 + ((query @ key.transpose(-1, -2)) / width**0.5).mean((1, 2)).sigmoid().detach()

    expected = plain.clone()
    positions = (inputs["input_ids"] == IMAGE_TOKEN).nonzero()
    h, w = model.model.multi_modal_projector.out_grid((side, side)) if compressed else (side, side)
    for image, rows in enumerate(positions.split(h * w)):
        with torch.no_grad():
            tokens = handle.module["1"](
                plain[rows[:, 0], rows[:, 1]][None],
                features[image : image + 1],
                token_grid=(h, w),
                feature_grid=(side, side),
                saliency=saliency[image : image + 1],
            )
        expected[rows[:, 0], rows[:, 1]] = tokens[0]
    # Float32 through a whole decoder, whose last bits differ from one version of transformers to the next.
    torch.testing.assert_close(remembered, expected, atol=2e-5, rtol=1e-5)
    text = inputs["input_ids"] != IMAGE_TOKEN
    assert torch.equal(remembered[text], plain[text])
    assert not torch.allclose(remembered, plain, atol=0.1)


def tower_output(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The last block's output, which the last hidden state equals only where no norm follows."""
    outputs: list[torch.Tensor] = []
    handle = tower.encoder.layers[-1].register_forward_hook(lambda *args: outputs.append(args[2]))
    with torch.no_grad():
        tower(pixels)
    handle.remove()
    return outputs[0]


def test_the_paper_preset_changes_the_output_at_once() -> None:
    model = build_llava()
    inputs = batch(model)
    expected = logits(model, **inputs)
    handle = attach_vision_remember(model, LAYERS, preset="paper")
    assert not torch.equal(logits(model, **inputs), expected)
    assert handle.config.attn_dim == "features"
    assert handle.module["1"].interaction.attn_dim == 3 * model.config.vision_config.hidden_size


def test_levels_are_scaled_to_the_encoder() -> None:
    assert default_levels(24) == (13, 18, 23)
    assert default_levels(27) == (15, 20, 26)
    assert default_levels(6) == (3, 5, 6)
    assert default_levels(1) == (1,)


def test_negative_levels_count_from_the_end() -> None:
    handle = attach_vision_remember(build_llava(), LAYERS, levels=(2, -2))
    assert handle.config.levels == (2, 5)


def test_the_position_table_covers_the_cells_under_a_token() -> None:
    model = build_llava(encoder="siglip")
    compress_projector(model, None, "adaptive_avg_pool", out_grid=(3, 2))
    handle = attach_vision_remember(model, LAYERS)
    assert handle.config.cells == (3, 4)  # 7x7 cells under 3x2 tokens


def test_disabled_runs_the_plain_model_and_nests() -> None:
    model = build_llava()
    inputs = batch(model)
    expected = logits(model, **inputs)
    handle = attach_vision_remember(model, LAYERS)
    randomise(handle)
    remembered = logits(model, **inputs)
    with handle.disabled():
        with handle.disabled():
            assert torch.equal(logits(model, **inputs), expected)
        assert torch.equal(logits(model, **inputs), expected)
        output = model.model.get_image_features(inputs["pixel_values"])
        assert getattr(output, "deepstack_features", None) is None
    assert torch.equal(logits(model, **inputs), remembered)


def test_times_of_being_disabled_may_overlap() -> None:
    handle = attach_vision_remember(build_llava(), LAYERS)
    attachment = find_attachment(handle.host)
    first, second = handle.disabled(), handle.disabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not attachment.enabled
    second.__exit__(None, None, None)
    assert attachment.enabled


def test_the_handle_prints_a_table_of_what_was_attached() -> None:
    handle = attach_vision_remember(build_llava("llama", "siglip"), LAYERS)
    table = str(handle)
    for part in (
        "LlavaForConditionalGeneration",
        "SiglipVisionModel",
        "3, 5, 6",
        "7x7 = 49 tokens",
        "1, 3",
        "received",
    ):
        assert part in table
    handle.detach()
    assert "detached" in str(handle)


def test_phases_train_what_the_paper_trains(capsys: pytest.CaptureFixture[str]) -> None:
    model = build_llava()
    handle = attach_vision_remember(model, LAYERS)

    def trained() -> set[str]:
        names = (name.split(".") for name, p in model.named_parameters() if p.requires_grad)
        return {"vision_remember" if "vision_remember" in name else ".".join(name[:2]) for name in names}

    handle.set_phase(1)
    assert trained() == {"vision_remember", "model.multi_modal_projector"}
    assert "language model" not in capsys.readouterr().out
    handle.set_phase(2)
    assert trained() == {"vision_remember", "model.multi_modal_projector", "model.language_model", "lm_head.weight"}
    assert "language model" in capsys.readouterr().out
    handle.set_phase(2, train_encoder=True)
    assert "model.vision_tower" in trained()
    assert handle.trainable_parameters() == list(handle.module.parameters())
    with pytest.raises(ValueError, match="phase=3"):
        handle.set_phase(3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hosts_get_blocks_of_their_dtype(dtype: torch.dtype) -> None:
    model = build_llava().to(dtype)
    inputs = batch(model)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    expected = logits(model, **inputs)
    handle = attach_vision_remember(model, LAYERS)
    assert {p.dtype for p in handle.module.parameters()} == {dtype}
    assert torch.equal(logits(model, **inputs), expected)
    randomise(handle)
    assert not torch.equal(logits(model, **inputs), expected)


def test_float32_blocks_run_inside_a_bfloat16_host() -> None:
    model = build_llava().to(torch.bfloat16)
    handle = attach_vision_remember(model, LAYERS)
    handle.module.float()
    randomise(handle)
    inputs = batch(model)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    output = model(**inputs, labels=inputs["input_ids"])
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert {p.grad.dtype for p in handle.module.parameters() if p.grad is not None} == {torch.float32}


def test_foreign_hooks_survive_attach_and_detach() -> None:
    model = build_llava()
    calls: list[str] = []
    model.model.register_forward_pre_hook(lambda *_: calls.append("base"))
    model.model.language_model.layers[1].register_forward_pre_hook(lambda *_: calls.append("layer"))
    attach_vision_remember(model, LAYERS).detach()
    logits(model, **batch(model))
    assert calls == ["base", "layer"]


def test_detaching_one_copy_leaves_the_other_attached() -> None:
    model = build_llava()
    inputs = batch(model)
    plain = logits(model, **inputs)
    randomise(attach_vision_remember(model, LAYERS))
    remembered = logits(model, **inputs)
    twin = copy.deepcopy(model)
    detach_vision_remember(model)
    assert torch.equal(logits(twin, **inputs), remembered)
    # generate() goes through the class's method, which the twin still needs.
    ahead = twin.model.get_image_features(inputs["pixel_values"], return_dict=True)
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    assert torch.equal(logits(twin, **text, mm_encoder_outputs={"image": ahead}), remembered)
    detach_vision_remember(twin)
    assert torch.equal(logits(twin, **inputs), plain)
