"""Bad input to attach and detach: a clear error, and the model is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.fingerprint import Fingerprint
from tests.hosts import DECODER_CONFIGS, VOCABULARY, batch, build_llava
from vision_remember import (
    MLLMSpec,
    VisionRememberConfig,
    attach_vision_remember,
    compress_projector,
    load_vision_remember,
)
from vision_remember import detach_vision_remember as detach
from vision_remember.adapters import DecoderSpec, attach_pruner

BAD: list[tuple[dict[str, Any], str]] = [
    ({"layers": [1, 40]}, r"layers=\[1, 40\]: this decoder has layers 0..3"),
    ({"layers": [-1]}, r"layers=\[-1\]: expected 0-based decoder layers, none negative"),
    ({"layers": [1, 1]}, r"layers=\[1, 1\]: an index is repeated"),
    ({"layers": []}, "layers=.*: expected at least one"),
    ({"layers": [1.5]}, "layers=.*: expected at least one whole number"),
    ({"layers": 1}, "layers=1: expected at least one whole number"),
    ({"levels": 2}, "levels=2: expected at least one whole number"),
    ({"config": {"layers": [1]}}, r"config=.*: expected a VisionRememberConfig, .*from_dict"),
    ({"spec": "llava"}, r"spec='llava': expected an MLLMSpec"),
    ({"spec": {}}, r"spec={}: expected an MLLMSpec"),
    ({"levels": [2, 7]}, r"levels=\[2, 7\]: CLIPVisionModel has hidden states 0..6"),
    ({"levels": [-8]}, r"levels=\[-8\]: .* hidden states 0..6"),
    ({"levels": [6, -1]}, "a level is repeated"),
    ({"levels": []}, "levels=.*: expected at least one"),
    ({"preset": "papper"}, "unknown preset 'papper': did you mean 'paper'"),
    ({"widow": 2}, "no field 'widow': did you mean 'window'"),
    ({"interaction": "sella"}, "unknown interaction 'sella': did you mean 'sela'"),
    ({"saliency": "clss"}, "saliency='clss': expected"),
    ({"saliency": "map_head"}, "CLIPVisionModel has no pooling head"),
    ({"saliency_variant": "softmx"}, "unknown saliency variant 'softmx': did you mean 'softmax'"),
    ({"saliency_level": 9}, "hidden states 0..6"),
    ({"num_heads": 7}, "num_heads=7 must divide the attention width 48"),
    ({"position": "here"}, "position='here': expected"),
    ({"window": 0}, "window=0"),
    ({"token_grid": (3, 0)}, "token_grid=.*positive integers"),
    ({"spec": MLLMSpec(name="llava", encoder="model.eyes")}, "has no module 'model.eyes' for its vision encoder"),
    ({"spec": MLLMSpec(name="llava", base="lm_head")}, "no get_image_features"),
    ({"spec": MLLMSpec(name="llava", projector="")}, "LlavaForConditionalGeneration at '' holds the encoder"),
    ({"spec": MLLMSpec(name="llava", projector="model")}, "LlavaModel at 'model' holds the encoder or the decoder"),
]


@pytest.mark.parametrize(("request_", "message"), BAD, ids=[str(request) for request, _ in BAD])
def test_a_bad_request_changes_nothing(request_: dict[str, Any], message: str) -> None:
    model = build_llava()
    before = Fingerprint(model)
    with pytest.raises(ValueError, match=message):
        attach_vision_remember(model, **{"layers": [1], **request_})
    before.check(model)


@pytest.mark.parametrize("given", ["llava-hf/llava-1.5-7b-hf", None, hf.LlavaForConditionalGeneration])
def test_what_is_no_model_is_named(given: Any, tmp_path: Path) -> None:
    for call in (
        lambda: attach_vision_remember(given, [1]),
        lambda: detach(given),
        lambda: load_vision_remember(given, tmp_path),
        lambda: compress_projector(given, None, "adaptive_avg_pool", ratio=4),
        lambda: attach_pruner(given, "fastv"),
    ):
        with pytest.raises(
            ValueError, match=r"expected a model, as from_pretrained\(\) returns it, not ('llava|None|<class)"
        ):
            call()


def test_a_grid_that_the_projector_does_not_make_is_refused() -> None:
    model = build_llava()
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    before = Fingerprint(model)
    with pytest.raises(ValueError, match=r"token_grid=\(3, 3\): the projector makes a grid of 4x4"):
        attach_vision_remember(model, [1], token_grid=(3, 3))
    before.check(model)


def test_a_grid_that_does_not_match_the_tokens_is_refused_in_the_first_call() -> None:
    model = build_llava()
    attach_vision_remember(model, [1], token_grid=(4, 4))
    with pytest.raises(ValueError, match="made 64 vision tokens of a tile, but token_grid=4x4 has 16"):
        model(**batch(model, (1,)))


def test_a_grid_can_be_given_for_a_projector_of_ones_own() -> None:
    model = build_llava()
    pool = torch.nn.AvgPool1d(2)
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: (pool(args[0].mT).mT,))
    attach_vision_remember(model, [1], token_grid=(8, 4))
    inputs = batch(model, (1,))
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    keep[0, 3:35] = False  # half of the placeholders
    model(input_ids=inputs["input_ids"][keep][None], pixel_values=inputs["pixel_values"])


def test_a_model_without_vision_is_no_host() -> None:
    model = hf.Qwen2ForCausalLM(DECODER_CONFIGS["qwen2"]())
    before = Fingerprint(model)
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM has no get_image_features.*spec=MLLMSpec"):
        attach_vision_remember(model, [1])
    before.check(model)


def unknown_decoder() -> Any:
    torch.manual_seed(0)
    text = hf.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4
    )
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
    ), text_config=text, image_token_id=90)).eval()  # fmt: skip


def test_a_decoder_that_is_in_no_table_attaches_with_a_spec_and_without() -> None:
    model = unknown_decoder()
    expected = DecoderSpec(model_type="gpt_neox")
    spec = MLLMSpec(name="llava", plain=True, decoder_spec=expected)
    assert attach_vision_remember(model, [1], spec=spec).spec.decoder_spec == expected
    detach(model)
    assert attach_vision_remember(model, [1]).spec.decoder_spec == expected


def test_a_decoder_without_layers_where_the_spec_says_is_an_error() -> None:
    model = unknown_decoder()
    before = Fingerprint(model)
    spec = MLLMSpec(name="llava", decoder_spec=DecoderSpec(model_type="gpt_neox", layers="blocks"))
    with pytest.raises(ValueError, match="no module 'blocks' for its layers"):
        attach_vision_remember(model, [1], spec=spec)
    before.check(model)


def test_an_unknown_encoder_is_named() -> None:
    model = build_llava()
    model.model.vision_tower = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        attach_vision_remember(model, [1])


def test_attach_twice_and_detach_without_attach() -> None:
    model = build_llava()
    with pytest.raises(RuntimeError, match="no Vision Remember is attached"):
        detach(model)
    handle = attach_vision_remember(model, [1])
    attached = Fingerprint(model)
    with pytest.raises(RuntimeError, match="attached to this model already"):
        attach_vision_remember(model, [2])
    attached.check(model)
    handle.detach()
    with pytest.raises(RuntimeError, match="was detached"):
        handle.detach()
    with pytest.raises(RuntimeError, match="was detached"):
        handle.module  # noqa: B018


@pytest.mark.parametrize("part", ["model", "decoder", "layer"])
def test_a_compiled_model_is_refused(part: str) -> None:
    model = build_llava()
    if part == "model":
        model.compile(backend="eager")
    elif part == "decoder":
        model.model.language_model.compile(backend="eager")
    else:
        layers = model.model.language_model.layers
        layers[2] = torch.compile(layers[2], backend="eager")
    before = Fingerprint(model)
    with pytest.raises(ValueError, match="compiled already"):
        attach_vision_remember(model, [1])
    before.check(model)
    with pytest.raises(ValueError, match=r"^OptimizedModule is compiled already"):
        attach_vision_remember(torch.compile(build_llava(), backend="eager"), [1])


def test_weights_on_the_meta_device_are_refused() -> None:
    model = build_llava().to("meta")
    structure = Fingerprint(model).structure
    with pytest.raises(ValueError, match="meta device"):
        attach_vision_remember(model, [1])
    assert Fingerprint(model).structure == structure


def test_an_error_in_the_middle_of_attaching_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_llava()
    before = Fingerprint(model)
    layer = model.model.language_model.layers[3]

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(layer), "register_forward_pre_hook", fail)
    with pytest.raises(KeyboardInterrupt):
        attach_vision_remember(model, [1, 3])
    monkeypatch.undo()
    before.check(model)


def test_a_configuration_can_be_given_whole_and_changed() -> None:
    config = VisionRememberConfig(layers=(0, 2), window=2, saliency=None)
    handle = attach_vision_remember(build_llava(), config=config, levels=[4])
    assert handle.config.layers == (0, 2)
    assert handle.config.levels == (4,)
    assert handle.config.window == 2
    assert handle.config.saliency is None
