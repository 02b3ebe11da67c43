"""OCR & Chart: characters, handwriting, signs on photographs, forms and bar charts."""

from __future__ import annotations

from vision_remember.synth.base import Aspect, Board, Question, Task, pick_questions, say
from vision_remember.synth.boards import board_task, first_word, last_word
from vision_remember.synth.labels import BLANK, COLOURS, DIGITS, EIGHTHS, HAND, LETTERS, PHOTO
from vision_remember.synth.page import Draw, Page, Sheet
from vision_remember.synth.sources import PHOTOS, places, table_columns

GROUP = "OCR & Chart"
MOST_LINES = 12  # a page of text or a chart does not grow with the grid: its questions keep their words
CHART_ROWS = 10
STEPS = {"coarse": 1, "medium": 2, "fine": 4}  # steps of a bar's height per cell

# families of anagrams: the bag of a word's letters does not tell the word, though bags of two letters nearly do
WORDS = say(
    "arts rats star team meat mate tame leap plea pale peal care race acre lead deal part trap "
    "step pest pets meal male lame pans snap span naps rate tear bear bare palm lamp east seat"
)


def draw_characters(page: Page, draw: Draw) -> list[Question]:
    """A block of random letters."""
    lines, columns = min(page.slots, MOST_LINES), min(page.columns, MOST_LINES)
    text = [[draw.pick(LETTERS) for _ in range(columns)] for _ in range(lines)]
    for row, line in enumerate(text):
        page.write(row, 0, line)
    asked = draw.sample(range(lines * columns), 16)
    return [
        Question(
            f"what letter is in row {place // columns + 1} column {place % columns + 1}",
            text[place // columns][place % columns],
            category="Non-Semantic Text Recognition",
        )
        for place in asked
    ]


def solve_characters(sheet: Sheet, question: Question) -> str | None:
    words = question.text.split()
    return sheet.text[int(words[5]) - 1][int(words[7]) - 1]


def _draw_heights(draw: Draw, count: int, top: int) -> list[int]:
    """Heights in 1..top after the rows of a real table."""
    column = draw.pick(table_columns())
    return [1 + round(draw.pick(column) * (top - 1)) for _ in range(count)]


def _extremes(names: list[str], heights: list[int], what: str) -> list[Question]:
    """Which bar is highest and lowest, where only one is."""
    questions = []
    for word, height in (("highest", max(heights)), ("lowest", min(heights))):
        if heights.count(height) == 1:
            name = names[heights.index(height)]
            questions.append(Question(f"which {what} is {word}", name, category="human_test"))
    return questions


def _draw_bar(page: Page, column: int, height: int, prefix: str) -> None:
    """Stacks cells on the lowest slot; ``height`` is in steps."""
    steps, base, unit = STEPS[page.level], page.grid - page.unit, page.unit
    for row in range(base - 1, base - 1 - CHART_ROWS, -1):
        filled = min(steps, max(0, height))
        if filled:
            page.put_cells(row, column * unit, 1, unit, f"{prefix}bar {8 * filled // steps}")
        height -= steps


def draw_bars(page: Page, draw: Draw) -> list[Question]:
    """A chart of a real table; a letter under each bar names it."""
    count = min(page.slots, MOST_LINES)
    names, heights = draw.sample(LETTERS, count), _draw_heights(draw, count, CHART_ROWS * STEPS[page.level])
    for column, (name, height) in enumerate(zip(names, heights, strict=True)):
        _draw_bar(page, column, height, "")
        page.write(page.slots - 1, column * page.columns // page.slots, (name,))
    asked = [
        Question(f"what is the value of {name}", str(height), category="augmented_test")
        for name, height in zip(names, heights, strict=True)
    ]
    return pick_questions(draw, [*asked, *_extremes(names, heights, "bar")])


def _bar_height(sheet: Sheet, column: int) -> int | None:
    """The height of the bar over a slot of the axis, in steps; None where its cells do not stack."""
    unit = 2 if sheet.level == "coarse" else 1
    height, ended = 0, False
    for row in range(len(sheet.cells) - unit - 1, -1, -1):
        pieces = set(sheet.cells[row][column * unit : (column + 1) * unit])
        piece = pieces.pop()
        if pieces or (piece != BLANK and (ended or not piece.startswith("bar"))):
            return None
        eighths = 0 if piece == BLANK else int(piece.split()[-1])
        height += eighths * STEPS[sheet.level] // 8
        ended = eighths < 8
    return height


def solve_bars(sheet: Sheet, question: Question) -> str | None:
    step = len(sheet.text[0]) // len(sheet.slots)
    names = sheet.text[-1][::step]
    words = question.text.split()
    if words[0] == "what":
        height = _bar_height(sheet, names.index(words[-1])) if words[-1] in names else None
        return str(height) if height else None
    heights = [_bar_height(sheet, column) if name in LETTERS else 0 for column, name in enumerate(names)]
    return _solve_extremes(names, heights, words[-1])


def _solve_extremes(names: list[str], heights: list[int | None], word: str) -> str | None:
    known = {name: height for name, height in zip(names, heights, strict=True) if height}
    if None in heights or not known:
        return None
    best = (max if word == "highest" else min)(known.values())
    winners = [name for name, height in known.items() if height == best]
    return winners[0] if len(winners) == 1 else None


def draw_colour_bars(page: Page, draw: Draw) -> list[Question]:
    """A chart whose bars are told apart by colour."""
    names = draw.shuffled(COLOURS)
    heights = _draw_heights(draw, len(names), CHART_ROWS * STEPS[page.level])
    columns = sorted(draw.sample(range(page.slots), len(names)))
    for name, height, column in zip(names, heights, columns, strict=True):
        _draw_bar(page, column, height, f"{name} ")
    asked = [
        Question(f"how high is the {name} bar", str(height), category="augmented_test")
        for name, height in zip(names, heights, strict=True)
    ]
    return pick_questions(draw, [*asked, *_extremes(names, heights, "colour")])


def solve_colour_bars(sheet: Sheet, question: Question) -> str | None:
    """Reads heights off the amount of each colour: the order of the cells does not matter."""
    eighths = dict.fromkeys(COLOURS, 0)
    for row in sheet.cells:
        for name in row:
            if name != BLANK:
                eighths[name.split()[0]] += int(name.split()[-1])
    width = 2 if sheet.level == "coarse" else 1
    heights: dict[str, int | None] = {name: sum_ * STEPS[sheet.level] // (8 * width) for name, sum_ in eighths.items()}
    words = question.text.split()
    if words[0] == "how":
        return str(heights[words[4]])
    return _solve_extremes(list(heights), list(heights.values()), words[-1])


def _draw_fields(page: Page, draw: Draw, alphabet: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Lines of a key letter, a gap and a value of three characters, one or two lines side by side."""
    across = min(2, page.columns // 6)
    rows = min(page.slots, MOST_LINES)
    keys = draw.sample(LETTERS, min(across * rows, 16))
    fields = []
    for number, key in enumerate(keys):
        value = [draw.pick(alphabet) for _ in range(3)]
        row, column = number // across, 6 * (number % across)
        page.write(row, column, (key,))
        page.write(row, column + 2, value)
        fields.append((key, value))
    return fields


def draw_form(page: Page, draw: Draw) -> list[Question]:
    """Keys and values."""
    fields = _draw_fields(page, draw, (*LETTERS, *DIGITS))
    asked = [Question(f"what is field {key}", "".join(value), category="form", spelled=True) for key, value in fields]
    return pick_questions(draw, asked)


def draw_handwriting(page: Page, draw: Draw) -> list[Question]:
    """Printed keys, handwritten numbers."""
    fields = _draw_fields(page, draw, tuple(f"hand {digit}" for digit in DIGITS))
    return pick_questions(
        draw,
        [
            Question(
                f"what number follows {key}",
                "".join(digit[-1] for digit in value),
                category="Handwriting Recognition",
                spelled=True,
            )
            for key, value in fields
        ],
    )


def solve_field(sheet: Sheet, question: Question) -> str | None:
    """Reads the value to the right of a key, in a form or in handwriting."""
    key = question.text.split()[-1]
    for line in sheet.text:
        for column in range(0, len(line) - 5, 6):
            if line[column] == key:
                value = line[column + 1 : column + 6]
                gaps, value = (value[0], value[4]), value[1:4]
                read = "".join(name.removeprefix("hand ") for name in value)
                return read if set(gaps) == {BLANK} and len(read) == 3 else None
    return None


def draw_sign(page: Page, draw: Draw) -> list[Question]:
    """Two words on a photograph."""
    size = page.grid * page.cell
    name = draw.pick(PHOTOS[page.split])
    down, across = places(name, size)
    page.photo = (name, draw.below(down), draw.below(across))
    page.put_cells(0, 0, page.grid, page.grid, PHOTO)
    middle = page.slots // 2
    words = draw.sample(WORDS, 2)
    for word, first, end in zip(words, (0, middle), (middle, page.slots), strict=True):
        page.write(draw.between(first, end - 1), draw.below(page.columns - len(word) + 1), tuple(word))
    return [
        Question(f"what does the {where} sign say", word, category="sign")
        for where, word in zip(("top", "bottom"), words, strict=True)
    ]


def solve_sign(sheet: Sheet, question: Question) -> str | None:
    middle = len(sheet.text) // 2
    lines = sheet.text[:middle] if "top" in question.text else sheet.text[middle:]
    written = [line for line in lines if any(name in LETTERS for name in line)]
    if len(written) != 1:
        return None
    places = [column for column, name in enumerate(written[0]) if name in LETTERS]
    word = "".join(written[0][column] for column in places)
    return word if places[-1] - places[0] == 3 and word in WORDS else None


NUMBERS = tuple(str(number) for number in range(CHART_ROWS * STEPS["fine"] + 1))

TASKS = (
    Task(
        "characters",
        GROUP,
        "OCRBench",
        "ocrbench_accuracy",
        detail=True,
        draw=draw_characters,
        solve=solve_characters,
        words=say("what letter is in row column", LETTERS, NUMBERS[1 : MOST_LINES + 1]),
        board=Board(LETTERS, {"letter": Aspect(LETTERS, str)}),
    ),
    board_task(
        "digits",
        GROUP,
        "OCRBench",
        "ocrbench_accuracy",
        Board(
            (*DIGITS, *HAND),
            {"digit": Aspect(DIGITS, last_word)},
        ),
        category="Handwriting Recognition",
    ),
    Task(
        "handwriting",
        GROUP,
        "OCRBench",
        "ocrbench_accuracy",
        detail=True,
        draw=draw_handwriting,
        solve=solve_field,
        words=say("what number follows", LETTERS, DIGITS),
    ),
    Task(
        "form",
        GROUP,
        "DocVQA",
        "anls",
        detail=True,
        draw=draw_form,
        solve=solve_field,
        words=say("what is field", LETTERS, DIGITS),
    ),
    Task(
        "sign",
        GROUP,
        "TextVQA",
        "exact_match",
        detail=False,
        draw=draw_sign,
        solve=solve_sign,
        words=say("what does the top bottom sign say", WORDS),
    ),
    Task(
        "bars",
        GROUP,
        "ChartQA",
        "relaxed_overall",
        detail=True,
        draw=draw_bars,
        solve=solve_bars,
        words=say("what is the value of which bar is highest lowest", LETTERS, NUMBERS),
    ),
    board_task(
        "gauges",
        GROUP,
        "ChartQA",
        "relaxed_overall",
        Board(
            tuple(f"{colour} bar {eighths}" for colour in COLOURS for eighths in EIGHTHS),
            {"height": Aspect(tuple(map(str, EIGHTHS)), last_word), "colour": Aspect(COLOURS, first_word)},
        ),
        category="human_test",
    ),
    Task(
        "colour_bars",
        GROUP,
        "ChartQA",
        "relaxed_overall",
        detail=False,
        draw=draw_colour_bars,
        solve=solve_colour_bars,
        words=say("how high is the bar which colour is highest lowest", COLOURS, NUMBERS),
    ),
)
