"""The report: its numbers are those of the library's functions, its geometry the encoder's, its page needs no other."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.fingerprint import Fingerprint
from tests.hosts import IMAGE_TOKEN, build_llava, image_side, randomise
from tests.processors import llava_processor, tokenizer
from tests.test_tiled_hosts import build
from vision_remember import (
    attach_vision_remember,
    attention_density,
    compress_projector,
    region_attention,
    saliency_map,
)
from vision_remember.adapters.prompts import prompt_inputs
from vision_remember.adapters.report import write_report
from vision_remember.adapters.report_data import _of_one_picture, make_report
from vision_remember.adapters.report_page import _bounds
from vision_remember.analysis import SaliencyMap

QUESTION = "w3 w4 <b>"


def picture(width: int = 32, height: int = 32) -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pooled(**options: Any) -> tuple[Any, Any, Any]:
    """A LLaVA with 4x4 tokens over 8x8 cells, its processor and the handle."""
    model = build_llava()
    processor = llava_processor("clip", image_side(model), model.config.vision_config.patch_size)
    compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    return model, processor, attach_vision_remember(model, [1, 3], **options)


def tiled() -> tuple[Any, Any, Any]:
    """A LLaVA-NeXT, whose processor cuts images into tiles."""
    model = build("llava_next")
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=model.config.image_grid_pinpoints,
    )
    processor = hf.LlavaNextProcessor(images, tokenizer(), 4, "default", num_additional_image_tokens=1)
    return model, processor, attach_vision_remember(model, [1])


@pytest.fixture(name="trained")
def trained_fixture() -> tuple[Any, Any, Any]:
    model, processor, handle = pooled()
    randomise(handle)
    return model, processor, handle


def test_its_numbers_are_those_of_the_functions(trained: Any) -> None:
    model, processor, handle = trained
    inputs = prompt_inputs(processor, picture(), QUESTION, model)
    model(**inputs)  # transformers installs hooks of its own in the first pass
    before = Fingerprint(model)
    report = make_report(model, processor, picture(), QUESTION, max_new_tokens=4)
    before.check(model)
    assert model.config._attn_implementation == "sdpa"
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    for group in ("vision", "text"):
        expected = attention_density(model, inputs).per_layer(group)
        torch.testing.assert_close(
            torch.tensor(data["attention_density"]["remembered"][group]), expected, atol=1e-5, rtol=1e-4
        )
    with handle.disabled():
        plain = attention_density(model, inputs).per_layer()
        with torch.no_grad():
            first = model(**inputs).logits[0, -1].softmax(-1)
    torch.testing.assert_close(torch.tensor(data["attention_density"]["plain"]["vision"]), plain, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(torch.tensor(data["attention_density"]["remembered"]["vision"]), plain, atol=1e-3)
    with torch.no_grad():
        change = (model(**inputs).logits[0, -1].softmax(-1) - first).clamp(min=0).sum()
    assert report.change == pytest.approx(float(change), abs=1e-5)
    assert report.change > 0.01
    for layer in (1, 3):
        expected = region_attention(model, inputs, layer)[0].in_region(0, *report.token)
        torch.testing.assert_close(torch.tensor(data["looks"][str(layer)]), expected, atol=1e-5, rtol=1e-4)
    (saliency,) = saliency_map(model, inputs)
    torch.testing.assert_close(torch.tensor(data["saliency"]), saliency.tiles, atol=1e-5, rtol=1e-4)
    by_token = saliency.tiles[0].view(4, 2, 4, 2).mean((1, 3))
    assert by_token[report.token] == by_token.max()
    assert report.answer != report.plain_answer


def test_a_tile_is_shown_as_the_encoder_saw_it(trained: Any) -> None:
    model, processor, _ = trained
    (tile,) = make_report(model, processor, picture(), QUESTION, max_new_tokens=1).tiles
    assert np.abs(tile.astype(int) - np.asarray(picture()).astype(int)).max() <= 1
    processor.image_processor.do_normalize = False
    (tile,) = make_report(model, processor, picture(), QUESTION, max_new_tokens=1).tiles
    assert np.abs(tile.astype(int) - np.asarray(picture()).astype(int)).max() <= 1
    processor.image_processor.do_normalize = True
    # CLIP's processor crops to the middle: of a wide picture the encoder sees no borders
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste(picture(), (32, 0))
    (tile,) = make_report(model, processor, wide, QUESTION, max_new_tokens=1).tiles
    assert np.abs(tile.astype(int) - np.asarray(picture()).astype(int)).max() <= 1


def test_the_box_is_the_region_of_the_token(trained: Any) -> None:
    model, processor, _ = trained
    report = make_report(model, processor, picture(), QUESTION, token=(2, 3), max_new_tokens=1)
    look = report.looks[1]
    assert _bounds(look, 2, 3) == ((4, 6), (6, 8))
    seen = look.over_tile(0, 2, 3).sum(0) > 0
    assert seen.nonzero().amin(0).tolist() == [4, 6]
    assert seen.nonzero().amax(0).tolist() == [5, 7]


def links(page: str) -> list[str]:
    return re.findall(r"""(?:src|href)=["']?([^"' >]{1,30})|url\((.{1,30})""", page)


def test_the_page_needs_no_other_and_escapes_what_it_is_given(trained: Any, tmp_path: Path) -> None:
    model, processor, handle = trained
    report = write_report(model, processor, picture(), QUESTION, tmp_path / "new" / "page.html", max_new_tokens=4)
    page = (tmp_path / "new" / "page.html").read_text()
    assert [link for link, _ in links(page)] == ["data:image/png;base64,iVBORw0K"] * 4
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "w3 w4 &lt;b&gt;" in page
    assert "<b>&" not in page
    assert report.answer in page
    for name, value in handle.summary().items():
        assert f"<tr><th>{name}</th><td>{value}</td></tr>" in page
    assert f"{100 * report.change:.1f} % of the probability" in page


def test_untrained_blocks_are_said_to_change_nothing(tmp_path: Path) -> None:
    model, processor, _ = pooled()
    report = write_report(model, processor, picture(), QUESTION, tmp_path / "page.html", max_new_tokens=2)
    assert report.change == 0
    assert report.answer == report.plain_answer
    assert "change nothing yet" in (tmp_path / "page.html").read_text()


def test_tiles_are_shown_one_by_one_and_stitched(tmp_path: Path) -> None:
    model, processor, _ = tiled()
    report = write_report(model, processor, picture(75, 50), QUESTION, tmp_path / "page.html", max_new_tokens=2)
    assert report.saliency is not None
    assert report.saliency.stitched is not None
    assert len(report.tiles) == len(report.saliency.tiles) == 5  # an overview, and 2x2 tiles
    page = (tmp_path / "page.html").read_text()
    assert "The encoder sees 5 tiles" in page
    assert len(links(page)) == 4  # the stitched map, the tiles, one layer, the density


class Cutting:
    """A processor that cuts a picture into three tiles, each of which is an image to the host (InternVL's, say)."""

    image_token, chat_template, image_processor, tokenizer = "<image>", None, None, tokenizer()

    def __call__(self, images: Any, text: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        ids = torch.tensor([[IMAGE_TOKEN] * 16 * 3 + [3, 4]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_tiles_that_are_images_to_the_host_are_shown_one_by_one(tmp_path: Path) -> None:
    model, _, _ = pooled()
    report = write_report(model, Cutting(), picture(96, 32), QUESTION, tmp_path / "page.html", max_new_tokens=1)
    assert not report.notes
    maps = saliency_map(model, Cutting()(None, None, "pt"))
    assert report.saliency is not None
    assert torch.equal(report.saliency.tiles, torch.cat([one.tiles for one in maps]))
    assert len(report.tiles) == 3
    page = (tmp_path / "page.html").read_text()
    assert "The encoder sees 3 tiles" in page
    assert "The model keeps them apart" in page
    sizes = (SaliencyMap(torch.zeros(1, 2, 2), None), SaliencyMap(torch.zeros(1, 2, 3), None))
    with pytest.raises(ValueError, match="2 tiles, which are not of one size"):
        _of_one_picture(sizes)


@pytest.mark.parametrize(("window", "numbered"), [(1, True), (2, True), (3, False)])
def test_numbers_are_spoken_of_where_they_are_drawn(window: int, numbered: bool, tmp_path: Path) -> None:
    model, processor, _ = pooled(window=window)
    write_report(model, processor, picture(), QUESTION, tmp_path / "page.html", token=(0, 0), max_new_tokens=1)
    page = (tmp_path / "page.html").read_text()
    assert "Each head is drawn by itself" in page
    assert ("the numbers of a head add up" in page) == numbered


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"saliency": None}, {"saliency": "without saliency"}),
        ({"interaction": "deformable"}, {"looks": "no attention weights"}),
        ({"interaction": "global"}, {}),
    ],
    ids=["no saliency", "deformable", "global"],
)
def test_what_cannot_be_shown_is_said(options: dict[str, Any], missing: dict[str, str], tmp_path: Path) -> None:
    model, processor, _ = pooled(**options)
    report = write_report(model, processor, picture(), QUESTION, tmp_path / "page.html", max_new_tokens=1)
    assert report.notes.keys() == missing.keys()
    page = (tmp_path / "page.html").read_text()
    assert page.count("Not shown: ") == len(missing)
    assert all(text in page for text in missing.values())


def test_bad_input_is_an_error_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, handle = pooled()
    path = tmp_path / "page.html"
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", None)  # refused before it would run
        for token in ((4, 0), (0, -1)):
            with pytest.raises(ValueError, match=r"row .*: a tile has 4x4 tokens, rows 0\.\.3 and columns 0\.\.3"):
                write_report(model, processor, picture(), QUESTION, path, token=token)
    monkeypatch.setattr(processor, "image_token", None)
    with pytest.raises(ValueError, match="neither a chat template nor an image_token"):
        write_report(model, processor, picture(), QUESTION, path)
    handle.detach()
    with pytest.raises(RuntimeError, match="no Vision Remember is attached"):
        write_report(model, processor, picture(), QUESTION, path)
    assert not path.exists()


def test_without_the_libraries_that_draw_it_says_which_extra_brings_them(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, _ = trained
    monkeypatch.delitem(sys.modules, "vision_remember.adapters.report_page")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"needs jinja2.*pip install 'vision-remember\[demo\]'"):
        write_report(model, processor, picture(), QUESTION, tmp_path / "page.html")


def test_a_chat_template_makes_the_prompt(trained: Any) -> None:
    model, processor, _ = trained
    processor.chat_template = (
        "{% for message in messages %}w1 {% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}w2"
    )
    report = make_report(model, processor, picture(), "w5", max_new_tokens=1)
    assert report.prompt == "w1 <image> w5 w2"
