"""Conversations in LLaVA's format, read row by row, checked before anything trains.

    python -m examples.train.conversations blip_laion_cc_sbu_558k.json --images images/

reports every bad row with its line, images decoded. A file is a JSON list, or one JSON object per line:

    {"id": "a1", "image": "a1.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                      {"from": "gpt", "value": "A page."}]}

"image" may be a list, or missing in rows without images. There must be as many images as there are ``<image>`` in what
the human says. Only the place of each row is kept in memory; images are opened when a row is asked for.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from PIL import Image
from torch.utils.data import Dataset

BadRows = Literal["stop", "skip"]
CheckImages = Literal["exist", "decode"]

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_KEYS = {"id", "image", "conversations"}
_SHOWN = 20
_OTHER = re.compile(r"\S|$")

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a row lies in its file: line and number, both from 1, and bytes from ``start`` to ``end``."""

    line: int
    number: int
    start: int
    end: int


@dataclass(frozen=True)
class Row:
    """A checked row.

    Attributes:
        turns: (role, text) in order, with placeholders where images stand.
        images: their files.
    """

    turns: tuple[tuple[str, str], ...]
    images: tuple[Path, ...]

    def messages(self) -> list[dict[str, Any]]:
        """The turns as chat templates take them, in parts of text and image."""
        return [{"role": role, "content": _parts(role, text)} for role, text in self.turns]


class BadRowError(ValueError):
    """A row that cannot be trained on."""


class Conversations(Dataset[dict[str, Any]]):
    """The rows of a file as TRL's collator takes them: "messages" and "images".

    Args:
        file: the conversations.
        images: the folder that names of images are relative to; None for the file's own.
        bad_rows: "stop" raises at the first look, naming the bad rows; "skip" names them in the log and goes without.
        check_images: "exist" looks whether the files are there. "decode" also decodes each, which takes a while.

    An image that turns out to be damaged only when it is opened follows ``bad_rows`` too: with "skip" the row before
    it, the last one for the first, takes its place. So the order of the data is the same in every run.

    Raises:
        ValueError: another word for ``bad_rows`` or ``check_images``.
        FileNotFoundError: no such file or folder.
        BadRowError: bad rows, with "stop", or no good one.
    """

    def __init__(
        self,
        file: str | Path,
        images: str | Path | None = None,
        *,
        bad_rows: BadRows = "stop",
        check_images: CheckImages = "exist",
    ) -> None:
        self.file, self.folder = Path(file), Path(images) if images is not None else Path(file).parent
        for name, word, words in (("bad_rows", bad_rows, BadRows), ("check_images", check_images, CheckImages)):
            if word not in get_args(words):
                raise ValueError(f"{name}={word!r}: expected one of {', '.join(get_args(words))}")
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file}: no such file of conversations")
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder of images")
        self.bad_rows = bad_rows
        self.problems: list[str] = []
        self._places: list[Place] = []
        for place, content in _rows(self.file):
            try:
                row = self._parse(content)
                if check_images == "decode":
                    _open_all(row)
                self._places.append(place)
            except BadRowError as error:
                self.problems.append(f"{self._name(place)}: {error}")
        self._report()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for attempt in range(len(self)):
            place = self._places[index - attempt]
            try:
                row = self.row(index - attempt)
                return {"messages": row.messages(), "images": _open_all(row)}
            except BadRowError as error:
                if self.bad_rows == "stop":
                    raise BadRowError(f"{self._name(place)}: {error}") from error
                logger.warning("%s: %s; the row before it takes its place", self._name(place), error)
        raise BadRowError(f"{self.file}: not one row has images that can be opened")

    def row(self, index: int) -> Row:
        """A row without its images."""
        place = self._places[index]
        with self.file.open("rb") as file:
            file.seek(place.start)
            return self._parse(file.read(place.end - place.start))

    def _name(self, place: Place) -> str:
        return f"{self.file}, line {place.line}, row {place.number}"

    def _report(self) -> None:
        shown = self.problems[:_SHOWN]
        if len(self.problems) > len(shown):
            shown.append(f"... and {len(self.problems) - len(shown)} more")
        if self.problems and self.bad_rows == "stop":
            listed = "\n  ".join(shown)
            raise BadRowError(f"{len(self.problems)} bad rows; mend them, or skip them by --bad_rows skip\n  {listed}")
        if not self._places:
            raise BadRowError(f"{self.file} has no good row" + "".join(f"\n  {problem}" for problem in shown))
        for problem in self.problems:
            logger.warning("%s; the row is skipped", problem)

    def _parse(self, content: bytes) -> Row:
        try:
            data = json.loads(content.decode())
        except UnicodeDecodeError as error:
            raise BadRowError(f"no UTF-8 ({error})") from error
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"no JSON ({error})") from error
        if not isinstance(data, dict):
            raise BadRowError(f"{type(data).__name__} instead of an object")
        images = tuple(self.folder / name for name in _image_names(data))
        turns = tuple(_turns(data))
        count = sum(text.count(PLACEHOLDER) for role, text in turns if role == "user")
        if count != len(images):
            raise BadRowError(f"{len(images)} images, but {count} times {PLACEHOLDER} in what the human says")
        for image in images:
            if not os.path.isfile(image):  # unlike Path's own, it takes every name
                raise BadRowError(f"no image {image}")
        return Row(turns, images)


def _image_names(data: dict[str, Any]) -> list[str]:
    names = data.get("image", [])
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadRowError(f"image={data['image']!r}: expected a name or a list of names")
    return names


def _turns(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(role, text) of each turn: an optional system prompt, then the human and the model in turn."""
    turns = data.get("conversations")
    if turns is None:
        others = sorted(set(data) - _KEYS)
        raise BadRowError(f"no key 'conversations'; it has {others}" if others else "no key 'conversations'")
    if not isinstance(turns, list) or not turns:
        raise BadRowError("conversations: expected a list of turns")
    expected = ["user", "assistant"]
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            raise BadRowError(f"turn {number}: expected the keys 'from' and 'value', came {_keys(turn)}")
        role, text = ROLES.get(str(turn["from"])), turn["value"]
        if role is None:
            raise BadRowError(f"turn {number} is from {turn['from']!r}: expected one of {', '.join(ROLES)}")
        if not isinstance(text, str) or not text.strip():
            raise BadRowError(f"turn {number} (from {turn['from']}) is empty")
        if role != "user" and PLACEHOLDER in text:
            where = "an answer" if role == "assistant" else "a system prompt"
            raise BadRowError(f"turn {number}: {where} holds {PLACEHOLDER}")
        if role == "system" and number == 1:
            yield role, text
            continue
        if role != expected[0]:
            raise BadRowError(f"turn {number} is from {turn['from']!r} where the other speaker's was expected")
        expected.reverse()
        yield role, text
    if expected[0] != "user":
        raise BadRowError("the last question has no answer")


def _keys(turn: Any) -> str:
    return str(sorted(turn)) if isinstance(turn, dict) else repr(turn)


def _parts(role: str, text: str) -> list[dict[str, str]]:
    if role != "user":
        return [{"type": "text", "text": text}]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _open_all(row: Row) -> list[Image.Image]:
    """The row's images, decoded."""
    images = []
    for path in row.images:
        try:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadRowError(f"image {path} cannot be decoded ({error})") from error
    return images


def _rows(file: Path) -> Iterator[tuple[Place, bytes]]:
    """Each row's place and content, of a JSON list or of one object per line."""
    with file.open("rb") as opened:
        first = opened.read(1)
        while first.isspace():
            first = opened.read(1)
    return _of_list(file) if first == b"[" else _of_lines(file)


def _of_lines(file: Path) -> Iterator[tuple[Place, bytes]]:
    with file.open("rb") as lines:
        start = number = 0
        for line, content in enumerate(lines, 1):
            if content.strip():
                number += 1
                yield Place(line, number, start, start + len(content)), content
            start += len(content)


def _of_list(file: Path) -> Iterator[tuple[Place, bytes]]:
    decoder = json.JSONDecoder()
    try:
        text = file.read_bytes().decode()  # not read_text, which would make one character of a line's two ends
    except UnicodeDecodeError as error:
        raise BadRowError(f"{file} is no UTF-8: {error}") from error
    at, line, offset, counted, number = text.index("[") + 1, 1, 0, 0, 0
    while True:
        at = _behind_spaces(text, at)
        if text[at : at + 1] == "]":
            return
        line, offset, counted = line + text.count("\n", counted, at), offset + len(text[counted:at].encode()), at
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"{file}, line {line}, row {number + 1}: the list breaks off here ({error})") from error
        number += 1
        row = text[at:end].encode()
        yield Place(line, number, offset, offset + len(row)), row
        at = _behind_spaces(text, end)
        if text[at : at + 1] not in (",", "]"):
            raise BadRowError(f"{file}, line {line}, row {number}: expected ',' or ']' behind it")
        at += text[at] == ","


def _behind_spaces(text: str, at: int) -> int:
    found = _OTHER.search(text, at)
    assert found is not None
    return found.start()


def main(argv: list[str] | None = None) -> None:
    """Checks a file, images decoded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--images", help="folder of the images; default: the file's own")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        conversations = Conversations(options.file, options.images, bad_rows="skip", check_images="decode")
    except (FileNotFoundError, BadRowError) as error:
        parser.error(str(error))
    print(f"{len(conversations)} good rows, {len(conversations.problems)} bad ones")


if __name__ == "__main__":
    main()
