"""The plug-in inside lmms-eval: what it answers, what it counts, what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmms_eval.models
import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image

from benchmarks.evaluation import evaluate
from benchmarks.local_tasks import rows, write_parquet
from benchmarks.official_tasks import BENCHMARKS
from tests.evaluation.models import TEMPLATE, small_model, tiled_model
from vision_remember import detach_vision_remember
from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.lmms_eval import LmmsEvalModel

GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


def document(index: int) -> list[dict[str, Any]]:
    """The messages of a document: prompts of several lengths, with no, one or two pictures."""
    shades = [((37 * index + 11 * i) % 255, (90 * index) % 255, 40 * i) for i in range((1, 2, 0, 1, 1)[index % 5])]
    pictures = [{"type": "image", "url": Image.new("RGB", (20 + index, 33), shade)} for shade in shades]
    text = {"type": "text", "text": "what is it? " * (1 + index % 3) + str(index)}
    return [{"role": "user", "content": [*pictures, text]}]


def request(index: int, generation: dict[str, Any] | None = None, *, task: str = "seen", args: int = 6) -> Instance:
    arguments = ("context", document, dict(generation or GREEDY), index, task, "test")
    return Instance("generate_until", arguments[-args:], 0, {"task": task, "doc_id": index, "repeats": 1})


def plugged(model: Any, processor: Any, **options: Any) -> LmmsEvalModel:
    lm = LmmsEvalModel(model, processor=processor, **options)
    lm.task_dict = {task: {"test": range(100)} for task in ("seen", "other")}
    return lm


def by_hand(model: Any, processor: Any, index: int, new: int = 6) -> str:
    """The answer without the plug-in: one prompt, one call."""
    (message,) = document(index)
    pictures = [part["url"] for part in message["content"] if part["type"] == "image"]
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return small_model()


def test_lmms_eval_finds_the_plugin_by_its_entry_point() -> None:
    assert "vision_remember" in lmms_eval.models.list_available_models(), (
        "the installed entry points are old: reinstall"
    )
    assert lmms_eval.models.get_model("vision_remember") is LmmsEvalModel


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("args", [5, 6])
def test_answers_are_those_of_single_calls(small: Any, batch_size: int, args: int) -> None:
    indices = [4, 0, 1, 2, 3, 6]
    answers = plugged(*small, batch_size=batch_size).generate_until([request(i, args=args) for i in indices])
    expected = [by_hand(*small, i) for i in indices]
    assert [answer.text for answer in answers] == expected
    assert len(set(expected)) > 1


def test_tiles_of_several_sizes_fit_into_one_batch() -> None:
    model, processor = tiled_model()
    lm, indices = plugged(model, processor, batch_size=4), [0, 1, 2, 20]
    answers = [answer.text for answer in lm.generate_until([request(i) for i in indices])]
    assert answers == [by_hand(model, processor, i) for i in indices]
    assert len(set(answers)) > 1
    one, two, none, wide = lm.records["seen"].vision_tokens
    assert none == 0 < one < two
    assert wide != one


def test_vision_remember_changes_the_answers(small: Any) -> None:
    model, processor = small
    lm, requests = plugged(model, processor), [request(i) for i in (0, 1, 3, 4)]
    with_it = [answer.text for answer in lm.generate_until(requests)]
    attachment = find_attachment(model)
    assert attachment is not None
    with VisionRememberHandle(attachment).disabled():
        without = [answer.text for answer in lm.generate_until(requests)]
        assert lm.settings()["enabled"] is False
    assert with_it != without
    assert lm.settings()["enabled"] is True


def test_requests_of_several_tasks_and_arguments_do_not_mix(small: Any) -> None:
    lm = plugged(*small, batch_size=4)
    longer = {**GREEDY, "max_new_tokens": 9}
    mixed = [request(0), request(1, longer), request(2, task="other"), request(3), request(4, longer)]
    answers = [answer.text for answer in lm.generate_until(mixed)]
    assert answers == [by_hand(*small, i, new) for i, new in enumerate((6, 9, 6, 6, 9))]
    assert {task: len(record.prompt_tokens) for task, record in lm.records.items()} == {"seen": 4, "other": 1}


def test_counts_tokens(small: Any) -> None:
    model, processor = small
    lm = plugged(model, processor, batch_size=3)
    answers = lm.generate_until([request(i) for i in range(3)])
    assert lm.records["seen"].vision_tokens == [16, 32, 0]
    texts = [processor.apply_chat_template(document(i), add_generation_prompt=True) for i in range(3)]
    images = (1, 2, 0)
    expected = [len(text.replace("<image>", "")) + 16 * count for text, count in zip(texts, images, strict=True)]
    assert lm.records["seen"].prompt_tokens == expected
    assert [answer.token_counts.input_tokens for answer in answers] == expected
    assert lm.records["seen"].prompt == texts[0]
    assert lm.records["seen"].to_dict()["vision_tokens"] == {"mean": 16, "min": 0, "max": 32}


def test_an_uncompressed_model_shows_its_larger_budget() -> None:
    lm = plugged(*small_model(compressed=False, remember=False))
    lm.generate_until([request(0)])
    assert lm.records["seen"].vision_tokens == [64]
    assert lm.settings()["vision_remember"] is None


def test_an_answer_ends_at_its_end_token(small: Any) -> None:
    model, processor = small
    lm = plugged(model, processor, batch_size=3)
    whole = lm.generate_until([request(i) for i in (0, 1, 3)])
    text = whole[0].text
    letter = text[2]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(letter)
    try:
        ended = lm.generate_until([request(i) for i in (0, 1, 3)])
    finally:
        model.generation_config.eos_token_id = before
    skipped = whole[0].token_counts.output_tokens - len(text)  # special tokens
    assert ended[0].text == text[: text.index(letter) + 1]
    assert ended[0].token_counts.output_tokens == len(ended[0].text) + skipped < 6
    assert [answer.token_counts.output_tokens for answer in whole] == [6, 6, 6]


@pytest.mark.parametrize("stop", ["string", "list"])
def test_stop_strings_cut_the_answer(small: Any, stop: str) -> None:
    lm = plugged(*small)
    (whole,) = lm.generate_until([request(0)])
    letter = whole.text[2]
    until = letter if stop == "string" else ["\n\n", letter]
    (cut,) = lm.generate_until([request(0, {**GREEDY, "until": until})])
    assert cut.text == whole.text[: whole.text.index(letter)]


def test_blank_stop_strings_do_not_cut(small: Any) -> None:
    lm = plugged(*small)
    assert lm._generation({"until": ["\n\n", " "]})[0] == []


def test_greedy_unless_the_task_samples(small: Any) -> None:
    lm = plugged(*small)
    assert lm._generation({})[1] == {"max_new_tokens": 1024, "num_beams": 1, "do_sample": False}
    _, greedy = lm._generation({"temperature": 0, "top_p": 1.0, "max_new_tokens": 16, "num_beams": 3})
    assert greedy == {"max_new_tokens": 16, "num_beams": 3, "do_sample": False}
    small[0].generation_config.pad_token_id, pad = None, small[0].generation_config.pad_token_id
    try:
        assert lm._generation({})[1]["pad_token_id"] == 0
    finally:
        small[0].generation_config.pad_token_id = pad
    _, sampled = lm._generation({"temperature": 0.7, "top_p": 0.9})
    assert (sampled["do_sample"], sampled["temperature"], sampled["top_p"]) == (True, 0.7, 0.9)


def test_a_temperature_of_zero_is_greedy_whatever_else_the_task_says(small: Any) -> None:
    """As in lmms-eval's own models: ``--gen_kwargs temperature=0`` joins the ``do_sample: true`` of a task."""
    lm = plugged(*small)
    assert lm._generation({"temperature": 0, "do_sample": True, "top_p": 0.9}) == lm._generation({})
    assert lm._generation({"do_sample": True})[1]["do_sample"]


def test_what_tasks_say_to_the_code_of_llava_is_passed_over(small: Any) -> None:
    """SEED-Bench, CMMMU and others have it among the arguments of ``generate``, which would refuse it."""
    lm = plugged(*small)
    (plain,) = lm.generate_until([request(0)])
    (answer,) = lm.generate_until([request(0, {**GREEDY, "image_aspect_ratio": "original"})])
    assert answer == plain


def test_a_models_own_sampling_is_switched_off(small: Any) -> None:
    model, processor = small
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    try:
        (answer,) = plugged(model, processor).generate_until([request(3)])
    finally:
        model.generation_config.do_sample, model.generation_config.temperature = False, None
    assert answer.text == by_hand(model, processor, 3)


def test_system_prompt_and_chat_template_reach_the_model(small: Any, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE.replace("assistant:", "answer:"))
    lm = plugged(*small, system_prompt="be brief", chat_template=str(template))
    lm.generate_until([request(2)])
    assert lm.records["seen"].prompt == f"system: be brief\nuser: {document(2)[0]['content'][0]['text']}\nanswer:"
    assert lm.settings()["system_prompt"] == "be brief"


def test_time_to_the_first_token_is_measured_on_request(small: Any) -> None:
    lm = plugged(*small, ttft=True, batch_size=2)
    lm.generate_until([request(i) for i in range(3)])
    (first, second, third) = lm.records["seen"].first_token_ms
    assert first == second != third  # of a whole batch
    assert all(0 < value < float("inf") for value in (first, third))
    assert plugged(*small).records == {}


def test_the_model_stays_after_an_evaluation(small: Any, tmp_path: Path) -> None:
    gqa = BENCHMARKS["GQA"]
    write_parquet(rows(gqa, 4), tmp_path / "gqa.parquet")
    lm = LmmsEvalModel(small[0], processor=small[1], batch_size=3)
    first = evaluate(lm, [gqa], folder=tmp_path / "files", data=tmp_path)
    second = evaluate(lm, [gqa], folder=tmp_path / "files", data=tmp_path)
    assert first is not None
    assert second is not None
    assert first["benchmarks"] == second["benchmarks"]
    assert first["benchmarks"]["GQA"]["requests"] == 4
    assert lm.model is small[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """Folders of base model and adapter, and the answers of what was saved."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = small_model(compressed=False, remember=False)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model, processor = small_model()
    expected = [answer.text for answer in plugged(model, processor).generate_until([request(i) for i in range(4)])]
    attachment = find_attachment(model)
    assert attachment is not None
    VisionRememberHandle(attachment).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", expected


def test_model_args_load_base_model_and_adapter(saved: tuple[Path, Path, list[str]]) -> None:
    base, adapter, expected = saved
    text = f"pretrained={base},adapter={adapter},dtype=float32,attn_implementation=eager"
    lm = lmms_eval.models.get_model("vision_remember").create_from_arg_string(
        text, {"batch_size": "3", "max_batch_size": None, "device": "cpu"}
    )
    lm.task_dict = {"seen": {"test": range(100)}}
    assert [answer.text for answer in lm.generate_until([request(i) for i in range(4)])] == expected
    settings = lm.settings()
    assert settings["pretrained"] == str(base)
    assert settings["adapter"] == str(adapter)
    assert list(settings["vision_remember"]["layers"]) == [1, 2]
    assert settings["dtype"] == "float32"
    assert set(settings["attn_implementation"].values()) == {"eager"}
    assert lm.device == torch.device("cpu")


def test_blocks_can_be_left_out_of_an_adapter(saved: tuple[Path, Path, list[str]]) -> None:
    base, adapter, expected = saved
    lm = LmmsEvalModel(str(base), str(adapter), device="cpu", blocks=False)
    lm.task_dict = {"seen": {"test": range(100)}}
    model, processor = small_model(remember=False)
    without = [by_hand(model, processor, i) for i in range(4)]
    assert [answer.text for answer in lm.generate_until([request(i) for i in range(4)])] == without != expected
    assert lm.records["seen"].vision_tokens == [16, 32, 0, 16]
    assert lm.settings()["enabled"] is False


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ("pretrained=x,adaptr=y", {}, "unknown argument 'adaptr': did you mean 'adapter'"),
        ("pretrained=x,device=cpu", {"device": "cuda"}, "device is given twice: in model_args 'cpu', as option 'cuda'"),
        ("adapter=y", {}, "expected pretrained=<hub id or folder>"),
        ("pretrained=x,dtype=int8", {}, "dtype='int8': expected auto, float32"),
        ("pretrained=x,device=cpu,device_map=auto", {}, "expected at most one of them"),
        ("pretrained=x", {"batch_size": "auto"}, "batch_size='auto': expected a whole number above 0"),
        ("pretrained=x", {"batch_size": 0}, "batch_size=0: expected a whole number"),
        ("pretrained=x", {"max_batch_size": 8}, "max_batch_size=8: there is no search"),
        ("pretrained=x,max_new_tokens=0", {}, "max_new_tokens=0: expected a whole number above 0"),
        (
            "pretrained=x,chat_template=no.jinja",
            {},
            "chat_template='no.jinja': neither a file nor a template, which has {{",
        ),
        ("pretrained=x,device=abacus", {}, "device 'abacus': expected one that this machine has"),
    ],
)
def test_bad_arguments_are_named(arguments: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LmmsEvalModel.create_from_arg_string(arguments, options)


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is neither a folder nor a repository id \(owner/name\)"):
        LmmsEvalModel("nowhere")


def test_a_model_in_memory_needs_its_processor(small: Any) -> None:
    with pytest.raises(ValueError, match="processor=None: a model in memory needs its processor"):
        LmmsEvalModel(small[0])
    with pytest.raises(ValueError, match="device='cpu', dtype='float16': the model is in memory already"):
        LmmsEvalModel(small[0], processor=small[1], device="cpu", dtype="float16")


def test_what_a_batch_needs_is_checked_first(small: Any) -> None:
    model, processor = small
    pad, processor.tokenizer.pad_token = processor.tokenizer.pad_token, None
    try:
        with pytest.raises(ValueError, match="batch_size=2: the tokenizer has no pad_token"):
            LmmsEvalModel(model, processor=processor, batch_size=2)
    finally:
        processor.tokenizer.pad_token = pad
    template, processor.chat_template = processor.chat_template, None
    try:
        with pytest.raises(ValueError, match="LlavaProcessor has no chat template: pass one"):
            LmmsEvalModel(model, processor=processor)
    finally:
        processor.chat_template = template


def test_weights_of_vision_remember_without_an_adapter_are_refused(tmp_path: Path) -> None:
    model, processor = small_model(compressed=False)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds \d+ weights of Vision Remember .* but there is no adapter"):
        LmmsEvalModel(str(tmp_path), device="cpu")
    detach_vision_remember(model)


def test_videos_and_other_kinds_of_task_are_refused(small: Any) -> None:
    lm = plugged(*small)
    film = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    filmed = replace(request(7), arguments=("", lambda _: film, GREEDY, 7, "seen", "test"))
    with pytest.raises(ValueError, match="task 'seen', document 7: video was given"):
        lm.generate_until([filmed])
    with pytest.raises(NotImplementedError, match="tasks seen: this scores by log-likelihood"):
        lm.loglikelihood([request(0)])
    with pytest.raises(NotImplementedError, match="tasks seen: this asks in several rounds"):
        lm.generate_until_multi_round([request(0)])


def test_the_example_of_the_page_runs(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the download of the task: lmms-eval's loop over local tasks is tested above."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)

    def answer(model: Any, tasks: list[str]) -> list[str]:
        assert tasks == ["gqa"]
        model.task_dict = {"seen": {"test": range(100)}}
        return [answer.text for answer in model.generate_until([request(index) for index in range(2)])]

    monkeypatch.setattr("lmms_eval.evaluator.simple_evaluate", answer)
    names = {"model": small[0], "processor": small[1]}
    exec(compile(code, "docs/evaluation.md", "exec"), names)
    assert names["results"] == [by_hand(*small, index) for index in range(2)]
