"""Writes the table of ``docs/synth.md`` and the sheets ``docs/images/synth_<group>.png``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vision_remember.synth import GROUPS, LEVELS, TASKS, make_scene
from vision_remember.synth.baselines import bag_accuracy, blind_accuracy

PAGE = Path(__file__).with_name("synth.md")
IMAGES = PAGE.parent / "images"
BEGIN = "<!-- Written by docs/make_synth_page.py; do not edit by hand. -->"
END = "<!-- End of what docs/make_synth_page.py writes. -->"
POOLS = (2, 3, 4)
FUNCTIONS = {
    "GQA": "exact_match (task `gqa`)",
    "MME-P": "`mme.utils.mme_process_results`, `mme_aggregate_results`",
    "AI2D": "exact_match after `ai2d.utils.MultiChoiceRegexFilter`",
    "ScienceQA": "`scienceqa.utils.sqa_process_results`",
    "MMStar": "`mmstar.utils.mmstar_process_results`",
    "MMMU": "`mmmu.utils.mmmu_process_results`",
    "OCRBench": "`ocrbench.utils.ocrbench_process_results`",
    "DocVQA": "`api.metrics.anls`",
    "TextVQA": "`textvqa.utils.textvqa_process_results`",
    "ChartQA": "`chartqa.utils.relaxed_correctness`",
    "RealWorldQA": "`realworldqa.utils.realworldqa_process_results`",
    "CVBench-2D": "`cv_bench.utils.cv_bench_process_results`",
    "CVBench-3D": "`cv_bench.utils.cv_bench_process_results`",
}


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def speed(task: str, scenes: int) -> tuple[float, float]:
    """Scenes and questions per second of one core, at the slowest level."""
    slowest = (float("inf"), float("inf"))
    for level in LEVELS:
        for index in range(20):  # what is drawn once is drawn before the clock starts
            make_scene(task, index, level=level)
        start = time.process_time()
        questions = sum(len(make_scene(task, index, level=level).questions) for index in range(scenes))
        seconds = time.process_time() - start
        slowest = min(slowest, (scenes / seconds, questions / seconds))
    return slowest


def table(scenes: int) -> list[str]:
    """One row per task, percent."""
    lines = [
        "| group | task | mirrors | asks | detail | chance | blind | coarse 2 / 3 / 4 | medium 2 / 3 / 4 "
        "| fine 2 / 3 / 4 | scenes/s | questions/s |",
        "|---" * 12 + "|",
    ]
    for task in TASKS.values():
        blind = blind_accuracy(task.name, scenes=20 * scenes)
        asked = 16 if task.board else 4  # a board's bags are counted, others' sampled
        bags = [
            " / ".join(
                percent(bag_accuracy(task.name, pool, level=level, scenes=scenes, questions=asked)) for pool in POOLS
            )
            for level in LEVELS
        ]
        question = make_scene(task.name, 0).questions[0].text
        pages, questions = speed(task.name, 10 * scenes)
        cells = [task.group, f"`{task.name}`", task.mirrors, question, "yes" if task.detail else "no"]
        cells += [percent(blind.chance), percent(blind.blind), *bags, f"{pages:.0f}", f"{questions:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    scorers = [f"| {mirror} | {function} |" for mirror, function in FUNCTIONS.items()]
    return [*lines, "", "| mirrored benchmark | what scores it in lmms-eval 0.7.3 |", "|---|---|", *scorers]


def sheet(group: str) -> Image.Image:
    """The group's tasks, one row each, at the three levels, with a question under each page."""
    tasks = [task for task in TASKS.values() if task.group == group]
    side, text, left = 288, 26, 150
    image = Image.new("RGB", (left + (side + 12) * len(LEVELS), 28 + (side + text + 10) * len(tasks)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for column, level in enumerate(LEVELS):
        draw.text((left + column * (side + 12), 6), level, fill="black", font=font)
    for row, task in enumerate(tasks):
        top = 28 + row * (side + text + 10)
        draw.text((6, top + 4), f"{task.name}\n({task.mirrors})", fill="black", font=font)
        for column, level in enumerate(LEVELS):
            scene = make_scene(task.name, 3, split="test", level=level)
            page = Image.fromarray(np.asarray(scene.image)).resize((side, side), Image.Resampling.NEAREST)
            place = left + column * (side + 12)
            image.paste(page, (place, top))
            question = scene.questions[0]
            words = f"{question.text}: {question.answer}"
            sizes = [ImageFont.load_default(size=size) for size in range(14, 7, -1)]
            small = next((size for size in sizes if size.getlength(words) <= side), sizes[-1])
            draw.text((place, top + side + 3), words, fill="black", font=small)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=50, help="test scenes per baseline")
    parser.add_argument("--sheets-only", action="store_true", help="draw the pictures and leave the table")
    options = parser.parse_args()
    for group in GROUPS:
        name = group.lower().replace(" & ", "_").replace("-", "_")
        sheet(group).save(IMAGES / f"synth_{name}.png", optimize=True)
    if not options.sheets_only:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        written = "\n".join([BEGIN, "", *table(options.scenes), "", END])
        PAGE.write_text(before + written + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
