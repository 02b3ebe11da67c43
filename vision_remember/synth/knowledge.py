"""Knowledge: diagrams, tables with a rule, sequences and turning gears."""

from __future__ import annotations

from itertools import pairwise

from vision_remember.synth.base import Aspect, Board, Question, Task, options, pick_questions, say
from vision_remember.synth.boards import board_task, first_word, last_word
from vision_remember.synth.labels import COLOURS, DIGITS, DIRECTIONS, LETTERS, TURNS
from vision_remember.synth.page import Draw, Page, Sheet

GROUP = "Knowledge"
MOST_ROWS = 12
MOST_GEARS = 6
HINT = "A larger number is heavier."


def draw_food_chain(page: Page, draw: Draw) -> list[Question]:
    """Chains of three letters with an arrow between neighbours."""
    across = min(2, page.slots // 6)
    top = draw.below(min(page.slots, MOST_ROWS) - 6 // across + 1)
    places = [(top + number // across, 6 * (number % across)) for number in range(6)]
    names = draw.sample(LETTERS, 3 * len(places))
    step = page.columns // page.slots
    asked = []
    for number, (row, column) in enumerate(places):
        chain = names[3 * number : 3 * number + 3]
        arrows = [draw.pick(("left", "right")) for _ in range(2)]
        for place, name in enumerate(chain):
            page.write(row, (column + 2 * place) * step, (name,))
        for place, arrow in enumerate(arrows):
            page.put(row, column + 2 * place + 1, f"arrow {arrow}")
            tail, head = chain[place : place + 2] if arrow == "right" else chain[place : place + 2][::-1]
            if arrows != ["left", "right"] or tail != chain[1]:  # the middle one points to both sides
                others = [name for name in names if name not in (tail, head)]
                text = f"what does {tail} point to"
                asked.append(Question(text, head, options(draw, head, others), category="food chain"))
    return pick_questions(draw, asked)


def solve_food_chain(sheet: Sheet, question: Question) -> str | None:
    tail = question.text.split()[2]
    heads = []
    for row, column, name in sheet.filled():
        if name.startswith("arrow"):
            ends = [sheet.at(row, column + side).removesuffix("+") for side in (-1, 1)]
            if any(end not in LETTERS for end in ends):
                continue
            start, end = ends if name.endswith("right") else ends[::-1]
            if start == tail:
                heads.append(end)
    return heads[0] if len(heads) == 1 else None


def _draw_table(page: Page, draw: Draw) -> dict[str, int]:
    """Letters, each with a digit to its right."""
    across = min(4, page.columns // 3)
    rows = min(page.slots, MOST_ROWS)
    names = draw.sample(LETTERS, min(len(LETTERS), across * rows))
    numbers = {name: draw.below(10) for name in names}
    for place, (name, number) in enumerate(numbers.items()):
        page.write(place // across, 3 * (place % across), (name, str(number)))
    return numbers


def _read_table(sheet: Sheet, name: str) -> int | None:
    for line in sheet.text:
        for left, right in zip(line[::3], line[1::3], strict=False):
            if left == name:
                return int(right) if right in DIGITS else None
    return None


def draw_table_rule(page: Page, draw: Draw) -> list[Question]:
    """Which of two is heavier or lighter, by the numbers of a table."""
    numbers = _draw_table(page, draw)
    asked = []
    for _ in range(16):
        one, other = draw.sample(tuple(numbers), 2)
        word = draw.pick(("heavier", "lighter"))
        if numbers[one] != numbers[other]:
            answer = one if (numbers[one] > numbers[other]) == (word == "heavier") else other
            asked.append(Question(f"which is {word} {one} or {other}", answer, (one, other), category="physics"))
    return asked


def solve_table_rule(sheet: Sheet, question: Question) -> str | None:
    words = question.text.split()
    one, other = _read_table(sheet, words[3]), _read_table(sheet, words[5])
    if one is None or other is None or one == other:
        return None
    return words[3] if (one > other) == (words[2] == "heavier") else words[5]


def draw_sums(page: Page, draw: Draw) -> list[Question]:
    """The sum of two numbers of a table."""
    numbers = _draw_table(page, draw)
    pairs = [draw.sample(tuple(numbers), 2) for _ in range(16)]
    return [
        Question(f"what is {one} plus {other}", str(numbers[one] + numbers[other]), category="Math")
        for one, other in pairs
    ]


def solve_sums(sheet: Sheet, question: Question) -> str | None:
    words = question.text.split()
    one, other = _read_table(sheet, words[2]), _read_table(sheet, words[4])
    return None if one is None or other is None else str(one + other)


def draw_sequence(page: Page, draw: Draw) -> list[Question]:
    """Lines of letters that all differ; the options are letters of the page in random order."""
    length = min(page.columns, MOST_ROWS) // 2 - 1
    across = min(2, page.columns // (length + 1))
    lines = len(LETTERS) // length
    places = [(row, part * (length + 1)) for row in range(min(page.slots, MOST_ROWS)) for part in range(across)]
    names = draw.shuffled(LETTERS)
    asked = []
    for number, (row, column) in enumerate(draw.sample(places, min(lines, len(places)))):
        line = names[number * length : (number + 1) * length]
        page.write(row, column, line)
        for name, after in pairwise(line):
            others = [other for other in names if other not in (name, after)]
            text = f"what comes after {name}"
            asked.append(Question(text, after, options(draw, after, others), category="diagram reasoning"))
    return pick_questions(draw, asked)


def solve_sequence(sheet: Sheet, question: Question) -> str | None:
    name = question.text.split()[-1]
    for line in sheet.text:
        if name in line[:-1]:
            after = line[line.index(name) + 1]
            return after if after in LETTERS else None
    return None


def draw_gears(page: Page, draw: Draw) -> list[Question]:
    """Rows of gears that drive each other; the first shows how it turns."""
    asked = []
    rows = draw.sample(range(min(page.slots, MOST_ROWS)), 4)
    for row, colour in zip(rows, draw.sample(COLOURS, 4), strict=True):
        count, turn = draw.between(2, MOST_GEARS), draw.below(2)
        start = draw.below(page.slots - count + 1)
        page.put(row, start, f"{colour} gear {TURNS[turn]}")
        for place in range(1, count):
            page.put(row, start + place, f"{colour} gear")
        answer = TURNS[(turn + count - 1) % 2]
        choices = tuple(draw.shuffled(TURNS))
        text = f"how does the last {colour} gear turn"
        asked.append(Question(text, answer, choices, category="Mechanical_Engineering"))
    return asked


def solve_gears(sheet: Sheet, question: Question) -> str | None:
    """Every second gear turns the other way, so that the count and the first turn tell the last."""
    colour = question.text.split()[4]
    names = [name for _, _, name in sheet.filled() if name.startswith(f"{colour} gear")]
    turns = [name.split()[-1] for name in names if name.split()[-1] in TURNS]
    return TURNS[(TURNS.index(turns[0]) + len(names) - 1) % 2] if len(turns) == 1 else None


TASKS = (
    board_task(
        "arrows",
        GROUP,
        "AI2D",
        "exact_match",
        Board(
            tuple(f"arrow {direction}" for direction in DIRECTIONS),
            {"direction": Aspect(DIRECTIONS, last_word, choices=4)},
        ),
        category="arrows",
    ),
    board_task(
        "gear_board",
        GROUP,
        "MMMU",
        "mmmu_acc",
        Board(
            tuple(f"{colour} gear {turn}" for colour in COLOURS for turn in TURNS),
            {"turn": Aspect(TURNS, last_word, choices=2), "colour": Aspect(COLOURS, first_word, choices=4)},
        ),
        category="Mechanical_Engineering",
    ),
    Task(
        "food_chain",
        GROUP,
        "AI2D",
        "exact_match",
        detail=True,
        draw=draw_food_chain,
        solve=solve_food_chain,
        words=say("what does point to", LETTERS),
    ),
    Task(
        "table_rule",
        GROUP,
        "ScienceQA",
        "exact_match",
        detail=True,
        draw=draw_table_rule,
        solve=solve_table_rule,
        words=say("which is heavier lighter or", LETTERS),
        hint=HINT,
    ),
    Task(
        "sequence",
        GROUP,
        "MMStar",
        "average",
        detail=True,
        draw=draw_sequence,
        solve=solve_sequence,
        words=say("what comes after", LETTERS),
    ),
    Task(
        "sums",
        GROUP,
        "MMMU",
        "mmmu_acc",
        detail=True,
        draw=draw_sums,
        solve=solve_sums,
        words=say("what is plus", LETTERS, tuple(map(str, range(19)))),
    ),
    Task(
        "gears",
        GROUP,
        "MMMU",
        "mmmu_acc",
        detail=False,
        draw=draw_gears,
        solve=solve_gears,
        words=say("how does the last gear turn", COLOURS, TURNS),
    ),
)
