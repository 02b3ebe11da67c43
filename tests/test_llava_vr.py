"""LLaVA-VR: put together from any parts, in the paper's sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image

import vision_remember
from examples.llava_vr import main
from examples.train.tiny import byte_tokenizer, language_config
from tests.hosts import ENCODER_CONFIGS
from vision_remember import build_llava_vr, load_vision_remember
from vision_remember.adapters.llava_vr import LlavaVR, llava_vr_configs, pinpoints


def built(encoder: str = "clip", **options: Any) -> LlavaVR:
    """A small one with random weights."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    language = language_config(len(tokenizer) + 8)
    options = {"tokenizer": tokenizer, "layers": [1, 2], "levels": [2, 4], **options}
    return build_llava_vr(ENCODER_CONFIGS[encoder](), language, **options)


def inputs(llava_vr: LlavaVR, size: tuple[int, int] = (40, 70)) -> Any:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what is this"}]}]
    text = llava_vr.processor.apply_chat_template(turns, add_generation_prompt=True)
    return llava_vr.processor(text=[text], images=[Image.effect_noise(size, 90).convert("RGB")], return_tensors="pt")


@pytest.mark.parametrize("tiles", [0, 4])
@pytest.mark.parametrize("size", ["0.9B", "2.0B"])
def test_the_papers_sizes(size: str, tiles: int) -> None:
    with torch.device("meta"):
        llava_vr = build_llava_vr(*llava_vr_configs(size), tiles=tiles)
    assert llava_vr.size == size
    assert str(llava_vr).startswith(f"LLaVA-VR {size} (")
    assert all(parameter.is_meta for parameter in llava_vr.model.parameters())
    assert llava_vr.handle.config.levels == (13, 18, 23)
    assert llava_vr.compression.token_grid == (12, 12)


def test_a_model_that_is_only_counted_may_have_a_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    with torch.device("meta"):
        llava_vr = build_llava_vr(ENCODER_CONFIGS["clip"](), language_config(20), tokenizer=tokenizer, layers=[1])
    embeddings: Any = llava_vr.model.get_input_embeddings()
    assert embeddings.weight.is_meta
    assert embeddings.num_embeddings == tokenizer.convert_tokens_to_ids("<image>") + 1


def test_the_larger_size_takes_the_attentions_own_projections() -> None:
    with torch.device("meta"):
        llava_vr = build_llava_vr(*llava_vr_configs("2.0B"), inner_projections=False)
    assert llava_vr.size == "1.9B"


@pytest.mark.parametrize("tiles", [0, 4])
@pytest.mark.parametrize("encoder", ENCODER_CONFIGS)
def test_any_parts_make_a_model_that_answers(encoder: str, tiles: int) -> None:
    llava_vr = built(encoder, tiles=tiles)
    prompt = inputs(llava_vr)
    images = (prompt["input_ids"] == llava_vr.model.config.image_token_id).sum()
    assert (images == 16) == (tiles == 0)
    made = llava_vr.model.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert made.shape[1] == prompt["input_ids"].shape[1] + 3
    with torch.no_grad():
        seen = llava_vr.model(**prompt).logits
        with llava_vr.handle.disabled():
            assert not torch.equal(llava_vr.model(**prompt).logits, seen)  # the paper's start is no identity


def test_the_default_preset_starts_as_an_identity() -> None:
    llava_vr = built(preset="default")
    prompt = inputs(llava_vr)
    with torch.no_grad(), llava_vr.handle.disabled():
        expected = llava_vr.model(**prompt).logits
    with torch.no_grad():
        assert torch.equal(llava_vr.model(**prompt).logits, expected)


def test_pretrained_parts_keep_their_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    vision = hf.CLIPVisionModel(ENCODER_CONFIGS["clip"]())
    language = hf.Qwen2ForCausalLM(language_config(len(tokenizer)))
    for name, part in {"vision": vision, "language": language}.items():
        part.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "language")
    llava_vr = build_llava_vr(
        str(tmp_path / "vision"), str(tmp_path / "language"), layers=[1], levels=[2], dtype=torch.bfloat16
    )
    model: Any = llava_vr.model
    for part, source in ((model.model.vision_tower, vision), (model.model.language_model, language.model)):
        state = part.state_dict()
        for key, tensor in source.state_dict().items():
            found = state[key][: len(tensor)]  # the placeholder may have got a row of its own
            assert torch.equal(found, tensor.bfloat16()), key
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.model.language_model.embed_tokens.num_embeddings == len(tokenizer) + 1
    assert llava_vr.processor.image_token_id == len(tokenizer)
    model.generate(**inputs(llava_vr).to(torch.bfloat16), max_new_tokens=1)


@pytest.mark.parametrize("tiles", [0, 4])
def test_parts_of_different_dtypes_keep_them_and_go_together(tiles: int) -> None:
    """The paper's own: CLIP is published in float32, Qwen2 in bfloat16."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    language = hf.Qwen2ForCausalLM(language_config(len(tokenizer) + 8)).bfloat16()
    vision = hf.CLIPVisionModel(ENCODER_CONFIGS["clip"]())
    llava_vr = build_llava_vr(vision, language, tokenizer=tokenizer, tiles=tiles, layers=[1], levels=[2])
    assert (vision.dtype, language.dtype) == (torch.float32, torch.bfloat16)
    prompt = inputs(llava_vr)
    llava_vr.model(**prompt, labels=prompt["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in llava_vr.handle.module.parameters())
    llava_vr.model.generate(**prompt, max_new_tokens=1)


@pytest.mark.parametrize("part", ["vision", "language"])
def test_files_that_lack_a_parts_weights_are_refused(part: str, tmp_path: Path) -> None:
    """transformers alone would go on with random ones, after a line in its log."""
    language = language_config(50)
    if part == "vision":  # an encoder inside of something else, under other names
        config = hf.LlavaConfig(vision_config=ENCODER_CONFIGS["clip"](), text_config=language, image_token_id=49)
        hf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
        parts: tuple[Any, Any] = (str(tmp_path), language)
    else:
        language.tie_word_embeddings = False
        hf.Qwen2Model(language).save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        parts = (ENCODER_CONFIGS["clip"](), str(tmp_path))
    with pytest.raises(ValueError, match=rf"{part}='.*': its files lack \d+ weights of a (CLIPVision|Qwen2)"):
        build_llava_vr(*parts, layers=[1], levels=[2])


def test_a_clip_of_two_towers_gives_its_vision_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=sizes, vision_config=ENCODER_CONFIGS["clip"]().to_dict()))
    clip.save_pretrained(tmp_path)
    llava_vr = build_llava_vr(str(tmp_path), language_config(50), layers=[1], levels=[2])
    state = llava_vr.model.model.vision_tower.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in clip.vision_model.state_dict().items())


@pytest.mark.parametrize("tiles", [0, 4])
def test_it_is_saved_as_a_base_and_an_adapter(tiles: int, tmp_path: Path) -> None:
    llava_vr = built(tiles=tiles)
    prompt = inputs(llava_vr)
    llava_vr.handle.save_pretrained(tmp_path / "adapter")
    llava_vr.model.save_pretrained(tmp_path / "base")
    kind = hf.LlavaNextForConditionalGeneration if tiles else hf.LlavaForConditionalGeneration
    model = kind.from_pretrained(tmp_path / "base")
    load_vision_remember(model, tmp_path / "adapter", fresh(tiles))
    with torch.no_grad():
        assert torch.equal(model(**prompt).logits, llava_vr.model(**prompt).logits)


def test_an_adapter_of_whole_images_fits_the_model_that_cuts_them_up(tmp_path: Path) -> None:
    """The paper's phases: the first without tiles, the second with them."""
    whole = built()
    whole.handle.save_pretrained(tmp_path)
    tiled = built(tiles=4, layers=[3])
    with torch.no_grad():
        tiled.model.model.multi_modal_projector.linear_1.weight.add_(1)
    tiled.handle.detach()
    tiled.compression.restore()
    handle = load_vision_remember(tiled.model, tmp_path, tiled.processor)
    for name, parameter in whole.handle.module.named_parameters():
        assert torch.equal(handle.module.get_parameter(name), parameter)
    for name, tensor in whole.model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(tiled.model.model.multi_modal_projector.state_dict()[name], tensor)
    images = inputs(tiled)["input_ids"] == tiled.model.config.image_token_id
    assert images.sum() > 16
    tiled.model(**inputs(tiled))


def fresh(tiles: int) -> Any:
    """A processor that knows nothing of a smaller projector."""
    llava_vr = built(tiles=tiles)
    llava_vr.handle.detach()
    llava_vr.compression.restore()
    return llava_vr.processor


def test_four_tiles_have_the_grids_of_llava_next() -> None:
    assert sorted(pinpoints(4, 336)) == sorted([[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])


def test_the_public_name_is_the_function() -> None:
    assert vision_remember.build_llava_vr is build_llava_vr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": hf.Dinov2Config()}, "vision='dinov2': expected a CLIP or SigLIP"),
        ({"tiles": 1}, "tiles=1: expected 0"),
        ({"tiles": -4}, "tiles=-4: expected 0"),
        ({"layers": [9]}, r"layers=\[9\]: this decoder has layers 0..3"),
        ({"preset": "papper"}, "did you mean 'paper'"),
        ({"ratio": 3}, "ratio=3: expected the square"),
    ],
    ids=str,
)
def test_what_cannot_be_put_together_is_an_error(change: dict[str, Any], message: str) -> None:
    arguments = {"vision": ENCODER_CONFIGS["clip"](), "language": language_config(50), "layers": [1], **change}
    with pytest.raises(ValueError, match=message):
        build_llava_vr(**arguments)


def test_a_language_model_without_a_head_is_an_error() -> None:
    with pytest.raises(ValueError, match=re.escape("language=Qwen2Model: expected a causal language model")):
        build_llava_vr(ENCODER_CONFIGS["clip"](), hf.Qwen2Model(language_config(50)))


def test_an_unknown_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"size='2B': did you mean '2\.0B'"):
        llava_vr_configs("2B")


def test_the_example_prints_both_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == ["0.9B", "2.0B"]
    printed = capsys.readouterr().out
    assert "LLaVA-VR 0.9B (" in printed
    assert "LLaVA-VR 2.0B (" in printed
