"""Boards: pages full of contents of one kind, asked about by row and column."""

from __future__ import annotations

from vision_remember.synth.base import Board, Question, Task, options, say
from vision_remember.synth.page import Draw, Page, Sheet

MOST = 12  # rows and columns: a board does not grow with the grid, so that its questions keep their words
ASKED = 16
ORDINALS = tuple(str(number) for number in range(1, MOST + 1))


def board_task(name: str, group: str, mirrors: str, metric: str, board: Board, category: str) -> Task:
    """A task whose pages are boards.

    Args:
        name, group, mirrors, metric: as of ``Task``.
        board: what its pages hold, and what is asked about it.
        category: the part of the mirrored benchmark.
    """

    def draw_board(page: Page, draw: Draw) -> list[Question]:
        side = min(page.slots, MOST)
        drawn = [[draw.pick(board.contents) for _ in range(side)] for _ in range(side)]
        for row, line in enumerate(drawn):
            for column, content in enumerate(line):
                page.put(row, column, content)
        asked = []
        for place in draw.sample(range(side**2), ASKED):
            row, column = divmod(place, side)
            word = draw.pick(tuple(board.aspects))
            aspect = board.aspects[word]
            answer = aspect.of(drawn[row][column])
            text = f"what {word} is in row {row + 1} column {column + 1}"
            others = [other for other in aspect.answers if other != answer]
            choices = options(draw, answer, others, aspect.choices) if aspect.choices else None
            asked.append(Question(text, answer, choices, category=category))
        return asked

    def solve_board(sheet: Sheet, question: Question) -> str | None:
        words = question.text.split()
        return board.aspects[words[1]].of(sheet.slots[int(words[5]) - 1][int(words[7]) - 1])

    said = tuple(answer for aspect in board.aspects.values() for answer in aspect.answers)
    words = say("what is in row column", tuple(board.aspects), said, ORDINALS)
    return Task(name, group, mirrors, metric, True, draw_board, solve_board, words, board=board)


def first_word(content: str) -> str:
    """The first word of a label."""
    return content.split()[0]


def last_word(content: str) -> str:
    """The last word of a label."""
    return content.split()[-1]
