"""A small file of conversations about rendered pages, so that the scripts run without any download."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = {"white": (250, 250, 250), "yellow": (250, 225, 90), "green": (90, 190, 110), "blue": (90, 140, 230)}
LETTERS = "AEHKMRSX"
SIZES = ((64, 64), (96, 48), (48, 96))


def write_rendered(folder: Path, count: int = 64, seed: int = 0) -> Path:
    """Writes pages and conversations in LLaVA's format: captions, questions of two turns, some rows without an image.

    Args:
        folder: made if missing; equal arguments write equal files.
        count: of the pages.
        seed: of what is on them.

    Returns:
        The file of conversations.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        name = f"images/{number:05d}.png"
        colour, letter = rng.choice(list(COLOURS)), rng.choice(LETTERS)
        _page(rng.choice(SIZES), colour, letter).save(folder / name)
        rows.append({"id": f"page-{number}", "image": name, "conversations": _turns(rng, colour, letter)})
        if number % 8 == 7:
            word = rng.choice(list(COLOURS))
            turns = [{"from": "human", "value": f"Repeat: {word}"}, {"from": "gpt", "value": word}]
            rows.append({"id": f"text-{number}", "conversations": turns})
    file = folder / "conversations.json"
    file.write_text(json.dumps(rows, indent=1))
    return file


def _turns(rng: random.Random, colour: str, letter: str) -> list[dict[str, str]]:
    if rng.random() < 0.5:
        asked = [("Describe the page.", f"A {colour} page with the letter {letter}.")]
    else:
        asked = [("What colour is the page?", colour), ("Which letter?", letter)]
    turns = []
    for number, (question, answer) in enumerate(asked):
        start = "<image>\n" if number == 0 else ""
        turns += [{"from": "human", "value": start + question}, {"from": "gpt", "value": answer}]
    return turns


def _page(size: tuple[int, int], colour: str, letter: str) -> Image.Image:
    image = Image.new("RGB", size, COLOURS[colour])
    middle = (size[0] / 2, size[1] / 2)
    ImageDraw.Draw(image).text(middle, letter, fill=(20, 20, 20), font=ImageFont.load_default(size=36), anchor="mm")
    return image
