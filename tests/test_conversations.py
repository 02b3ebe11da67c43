"""LLaVA's conversations: good rows come as they are, bad ones are reported with their line, answers alone count."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from examples.train.conversations import BadRowError, Conversations, main
from examples.train.rendered import write_rendered
from examples.train.tiny import build_tiny

ROOT = Path(__file__).resolve().parents[1]

GOOD = {
    "id": "a",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it? é"},
        {"from": "gpt", "value": "A page."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}
TEXT = {"id": "t", "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}


def with_turn(number: int, **change: Any) -> dict[str, Any]:
    turns = [dict(turn) for turn in GOOD["conversations"]]  # type: ignore[attr-defined]
    turns[number].update(change)
    return {**GOOD, "conversations": turns}


BAD: dict[str, tuple[Any, str]] = {
    "a missing image": ({**GOOD, "image": "gone.png"}, r"no image .*gone\.png"),
    "a placeholder too few": ({**GOOD, "image": ["a.png", "a.png"]}, "2 images, but 1 times <image>"),
    "a placeholder too many": (with_turn(2, value="<image> Sure?"), "1 images, but 2 times <image>"),
    "no image for a placeholder": ({k: v for k, v in GOOD.items() if k != "image"}, "0 images, but 1 times <image>"),
    "an empty answer": (with_turn(1, value=" \n"), r"turn 2 \(from gpt\) is empty"),
    "an answer of null": (with_turn(1, value=None), r"turn 2 \(from gpt\) is empty"),
    "a placeholder in an answer": (with_turn(1, value="<image>"), "turn 2: an answer holds <image>"),
    "a placeholder in a system prompt": (
        {"conversations": [{"from": "system", "value": "See <image>."}, *TEXT["conversations"]]},  # type: ignore[misc]
        "turn 1: a system prompt holds <image>",
    ),
    "an image of an impossible name": ({**GOOD, "image": "x" * 300}, "no image .*xxx"),
    "another key": ({"id": "a", "messages": []}, r"no key 'conversations'; it has \['messages'\]"),
    "another key in a turn": (
        {**GOOD, "conversations": [{"role": "user", "content": "Hi."}]},
        r"turn 1: expected the keys 'from' and 'value', came \['content', 'role'\]",
    ),
    "another speaker": (with_turn(1, **{"from": "bot"}), "turn 2 is from 'bot': expected one of human, gpt, system"),
    "a speaker twice": (with_turn(1, **{"from": "human"}), "turn 2 is from 'human' where the other speaker's"),
    "a question without an answer": (
        {**GOOD, "conversations": GOOD["conversations"][:3]},  # type: ignore[index]
        "the last question has no answer",
    ),
    "no turns": ({**GOOD, "conversations": []}, "expected a list of turns"),
    "an image that is no name": ({**GOOD, "image": 7}, "image=7: expected a name or a list of names"),
    "no object": ([1], "list instead of an object"),
}


@pytest.fixture(name="folder")
def with_an_image(tmp_path: Path) -> Path:
    Image.effect_noise((40, 60), 80).convert("RGB").save(tmp_path / "a.png")
    return tmp_path


def write(folder: Path, rows: list[Any], kind: str) -> Path:
    """A list on several lines, row n on line n + 1; or a row per line, row n on line n."""
    file = folder / f"rows.{kind}"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("[\n" + ",\n".join(lines) + "\n]" if kind == "json" else "\n".join(lines))
    return file


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_rows_come_as_chat_templates_take_them(folder: Path, kind: str) -> None:
    conversations = Conversations(write(folder, [GOOD, TEXT, GOOD], kind))
    assert len(conversations) == 3
    assert conversations[2] == conversations[0]
    first, text = conversations[0], conversations[1]
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"] * 2
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhat is it? é"}]
    assert first["messages"][0]["content"] == parts
    assert [image.size for image in first["images"]] == [(40, 60)]
    assert text["images"] == []


def test_a_list_may_be_laid_out_in_any_way(folder: Path) -> None:
    compact, wide = folder / "compact.json", folder / "wide.json"
    compact.write_text(json.dumps([GOOD, TEXT], separators=(",", ":")))
    wide.write_text("\n\n" + json.dumps([GOOD, TEXT], indent=4) + "\n")
    for file in (compact, wide):
        assert [Conversations(file)[n]["messages"][1]["content"][0]["text"] for n in (0, 1)] == ["A page.", "Hello."]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_reported_with_its_line(
    folder: Path, bad: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    row, message = BAD[bad]
    file = write(folder, [GOOD, row, TEXT], kind)
    where = rf"line {3 if kind == 'json' else 2}, row 2: .*{message}"
    with pytest.raises(BadRowError, match=where):
        Conversations(file)
    with caplog.at_level(logging.WARNING):
        conversations = Conversations(file, bad_rows="skip")
    assert len(conversations) == 2
    assert conversations[1]["images"] == []
    assert "the row is skipped" in caplog.text
    assert len(conversations.problems) == 1


def test_all_bad_rows_are_named_at_once(folder: Path) -> None:
    file = write(folder, [row for row, _ in BAD.values()], "jsonl")
    with pytest.raises(BadRowError, match=f"{len(BAD)} bad rows") as error:
        Conversations(file)
    assert str(error.value).count("line ") == len(BAD)


def truncated(folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])


def test_a_truncated_image_is_found_when_it_is_opened(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    truncated(folder)
    file = write(folder, [TEXT, {**GOOD, "image": "cut.png"}, GOOD], "jsonl")
    stopping = Conversations(file)
    with pytest.raises(BadRowError, match=r"line 2, row 2: image .*cut\.png cannot be decoded"):
        _ = stopping[1]
    skipping = Conversations(file, bad_rows="skip")
    assert skipping[1] == skipping[0]
    assert "line 2, row 2" in caplog.text
    assert "the row before it takes its place" in caplog.text
    assert len(skipping[2]["images"]) == 1


def test_an_image_that_vanishes_during_a_run_follows_bad_rows(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    file = write(folder, [GOOD, {**GOOD, "image": "b.png"}], "jsonl")
    stopping, skipping = Conversations(file), Conversations(file, bad_rows="skip")
    (folder / "b.png").unlink()
    with pytest.raises(BadRowError, match=r"line 2, row 2: no image .*b\.png"):
        _ = stopping[1]
    assert skipping[1] == skipping[0]
    assert "line 2, row 2: no image" in caplog.text


def test_a_line_that_is_no_utf8_is_a_bad_row(folder: Path) -> None:
    """Not a good one that fails once its turn comes."""
    file = folder / "rows.jsonl"
    lines = [json.dumps(TEXT).encode(), json.dumps(TEXT).replace("Hello", "Caf#").encode().replace(b"#", b"\xe9")]
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(BadRowError, match="line 2, row 2: no UTF-8"):
        Conversations(file)
    assert len(Conversations(file, bad_rows="skip")) == 1


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_what_is_nested_too_deep_is_a_bad_row(folder: Path, kind: str) -> None:
    file = folder / f"rows.{kind}"
    file.write_text(("[" if kind == "json" else "") + '{"id": ' + "[" * 100_000)
    with pytest.raises(BadRowError, match=r"line 1, row 1: .*(no JSON|breaks off)"):
        Conversations(file)


@pytest.mark.parametrize(("option", "word"), [("bad_rows", "skipp"), ("check_images", "decoded")])
def test_words_that_mean_nothing_are_refused(folder: Path, option: str, word: str) -> None:
    file = write(folder, [TEXT], "json")
    with pytest.raises(ValueError, match=f"{option}='{word}': expected one of "):
        Conversations(file, **{option: word})  # type: ignore[arg-type]


def test_images_are_decoded_before_if_one_asks(folder: Path) -> None:
    truncated(folder)
    file = write(folder, [TEXT, {**GOOD, "image": "cut.png"}], "json")
    with pytest.raises(BadRowError, match=r"line 3, row 2: image .*cut\.png cannot be decoded"):
        Conversations(file, check_images="decode")
    assert len(Conversations(file, check_images="decode", bad_rows="skip")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"id": 1},\n{"id": ', "line 3, row 2: the list breaks off here"),
        ('[\n{"id": 1}\n{"id": 2}]', "line 2, row 1: expected ',' or ']' behind it"),
        ('{"id": 1}\n{"id": ', "line 2, row 2: no JSON"),
        ("[]", "has no good row"),
        ("", "has no good row"),
    ],
)
def test_a_damaged_file_is_an_error(folder: Path, text: str, message: str) -> None:
    (folder / "rows.json").write_text(text)
    with pytest.raises(BadRowError, match=message):
        Conversations(folder / "rows.json")


def test_what_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.json: no such file"):
        Conversations(folder / "gone.json")
    with pytest.raises(FileNotFoundError, match="gone: no such folder of images"):
        Conversations(write(folder, [TEXT], "json"), folder / "gone")


def test_a_file_can_be_checked_by_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(write(folder, [GOOD, BAD["an empty answer"][0], TEXT], "json"))])
    assert capsys.readouterr().out == "2 good rows, 1 bad ones\n"


def test_a_file_that_is_not_there_is_no_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main([str(folder / "nowhere.json")])
    assert info.value.code == 2
    assert "nowhere.json: no such file of conversations" in capsys.readouterr().err


def test_rendered_conversations_are_good_and_the_same_each_time(tmp_path: Path) -> None:
    files = [write_rendered(tmp_path / name, 12, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    texts = [file.read_text() for file in files]
    assert texts[0] == texts[1] != texts[2]
    conversations = Conversations(files[0], check_images="decode")
    assert len(conversations) == 13
    assert {len(conversations[index]["images"]) for index in range(13)} == {0, 1}


@pytest.mark.parametrize("tiles", [0, 4])
def test_only_the_answers_count_whatever_the_turns_and_tiles(folder: Path, tiles: int) -> None:
    processor = build_tiny(tiles, layers=[1]).processor
    rows = Conversations(write(folder, [GOOD, TEXT], "json"))
    batch = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)([rows[0], rows[1]])
    ids, labels = batch["input_ids"], batch["labels"]
    assert ((labels == ids) | (labels == -100)).all()
    answers = [processor.tokenizer.decode(row[row != -100]) for row in labels]
    assert answers == ["A page.<|im_end|>Yes.<|im_end|>", "Hello.<|im_end|>"]
    images = (ids == processor.image_token_id).sum(1).tolist()
    assert images[1] == 0
    assert (images[0] == 16) == (tiles == 0)


def test_the_plain_template_is_an_image_and_its_caption(folder: Path) -> None:
    processor = build_tiny(layers=[1]).processor
    processor.chat_template = (ROOT / "examples" / "configs" / "plain.jinja").read_text()
    caption = {**GOOD, "conversations": GOOD["conversations"][:2]}  # type: ignore[index]
    rows = Conversations(write(folder, [caption], "json"))
    batch = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)([rows[0]])
    assert processor.tokenizer.decode(batch["input_ids"][0, 16:]) == "A page.<|im_end|>"
    assert (batch["labels"][0] != -100).tolist() == [False] * 16 + [True] * 8
