"""The proof: its questions, its controls, its statistics, and a run of the smallest level from start to report."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from benchmarks.proof.arms import ArmSpec, Pretrained, build_arm
from benchmarks.proof.claims import CLAIMS
from benchmarks.proof.levels import CPU, GPU, TINY
from benchmarks.proof.model import TokenPlaces, answer_logits, build_model
from benchmarks.proof.pages import (
    BLANK_LABEL,
    SYMBOLS_FROM,
    VALIDATION_FROM,
    build_pages,
    build_words,
    label_names,
    read_boards,
    task_names,
)
from benchmarks.proof.prepare import Workshop
from benchmarks.proof.runner import Job, read_lines, reads_tokens, run_suites, stages_file
from benchmarks.proof.statistics import Comparison, compared, mean_of, recovered
from benchmarks.proof.suites import INTERACTION_NAMES, SEARCHED, SUITES, distinct
from benchmarks.proof.symbols import FIRST_TOKENS, MOST_TOKENS, Curriculum, Lookup, PageCode
from benchmarks.proof.words import IGNORE, Streams, Words, stream

LEVEL = replace(TINY, tasks=("attribute", "characters"))


def test_a_cell_is_one_word_and_fillers_are_left_out() -> None:
    words = Words(("letter", "red"), grid=12)
    assert words.question("what letter is in row 3 column 7") == [
        words.number("letter"),
        words.first_cell + 2 * 12 + 6,
    ]
    with pytest.raises(ValueError, match="'blue' is not among the 149 words"):
        words.question("blue")


def test_packed_questions_are_answered_as_each_alone() -> None:
    torch.manual_seed(0)
    words = build_words(LEVEL)
    model = build_model(LEVEL.shape, len(words), 0)
    vision = torch.randn(1, 9, LEVEL.shape.text_width)
    questions = [
        ("what colour is the cross", ("red",)),
        ("what letter is in row 2 column 3", ("a",)),
        ("red", ("a", "b")),
    ]

    def logits(asked: list[Any], length: int) -> torch.Tensor:
        rows, taken = stream(words, asked, length)
        assert taken == len(asked)
        streams = Streams(*(torch.tensor(row)[None] for row in rows))
        return answer_logits(model, vision, streams)[0]

    together = logits(questions, 16)
    alone = torch.cat([logits([question], 6) for question in questions])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_questions_that_find_no_room_are_left_out() -> None:
    words = Words(("red", "blue"), grid=2)
    rows, taken = stream(words, [("red", ("blue",)), ("blue", ("red", "red"))], 2)
    assert taken == 1
    assert rows[3] == [words.number("blue"), IGNORE]


def test_training_validation_and_symbol_pages_are_not_the_same() -> None:
    words = build_words(LEVEL)
    sets = [build_pages(LEVEL, words, 6, first=first, pixels=False) for first in (0, SYMBOLS_FROM, VALIDATION_FROM)]
    sets.append(build_pages(LEVEL, words, 6, split="test", pixels=False))
    pages = [page.numpy().tobytes() for one in sets for page in one.labels]
    assert len(set(pages)) == len(pages)


def test_the_sets_are_what_their_names_say(tmp_path: Path) -> None:
    """Validation pages are new pages of the training split; test pages are of a split of their own."""
    words, workshop = build_words(LEVEL), Workshop(LEVEL, tmp_path)
    for name, count, start in (
        ("train", LEVEL.train_pages, {}),
        ("validation", LEVEL.validation_pages, {"first": VALIDATION_FROM}),
        ("test", LEVEL.test_pages, {"split": "test"}),
        ("symbols", LEVEL.symbol_pages, {"first": SYMBOLS_FROM, "pixels": False}),
    ):
        made, expected = workshop.pages(name).state(), build_pages(LEVEL, words, count, **start).state()
        for part in expected:
            assert torch.equal(made[part], expected[part]), (name, part)


def test_lookups_ask_what_stands_in_a_shown_cell() -> None:
    words, labels, tasks = build_words(CPU), label_names(), task_names(CPU)
    lookup = Lookup(labels, words, 12, tasks)
    boards = read_boards(tasks)
    pages, shown, streams = lookup.draw(5, 2, 7, 0.5, torch.Generator().manual_seed(0))
    assert shown.shape == (5, 7)
    for page, tokens, asked, truth in zip(pages, shown, streams.tokens, streams.target, strict=True):
        for word, cell, right in zip(asked[::2].tolist(), asked[1::2].tolist(), truth[1::2].tolist(), strict=True):
            row, column = divmod(cell - words.first_cell, 12)
            content = labels[page[row, column]]
            assert page[row, column] != BLANK_LABEL
            answers = {
                board.aspects[words.names[word]].of(content)
                for board in boards
                if content in board.contents and words.names[word] in board.aspects
            }
            assert words.names[right] in answers
            assert row // 2 * 6 + column // 2 in tokens.tolist()


def test_more_is_shown_when_what_is_shown_is_read() -> None:
    curriculum = Curriculum(3)
    for accuracy in (0.5, 1.0, 1.0):
        curriculum.note(accuracy)
    assert (curriculum.shown, curriculum.reads_cells) == (FIRST_TOKENS, False)
    curriculum.note(1.0)
    assert (curriculum.shown, curriculum.reads_cells) == (2 * FIRST_TOKENS, False)
    for _ in range(9):
        curriculum.note(1.0)
    assert (curriculum.shown, curriculum.reads_cells, curriculum.filled) == (MOST_TOKENS, True, 2 / 9)
    for _ in range(3):
        curriculum.note(1.0)
    assert curriculum.filled == pytest.approx(3 / 9)
    for _ in range(30):
        curriculum.note(1.0)
    assert curriculum.filled == 1


@pytest.mark.parametrize("side", [2, 3, 4])
def test_every_cell_of_a_token_can_be_read_off_its_code(side: int) -> None:
    """The subspaces of a token's cells share no direction, so that a linear map tells them apart."""
    torch.manual_seed(0)
    words, labels = build_words(CPU), label_names()
    places = TokenPlaces(12, 128)
    code = PageCode(torch.nn.Embedding(len(words), 128), places, labels, words, 12, side)
    turns = code.get_buffer("turns").double()
    together = torch.cat(list(turns.transpose(1, 2)), dim=1)
    assert torch.linalg.matrix_rank(together, rtol=1e-4) == side**2 * (128 // side**2)
    page = torch.randint(len(labels), (1, 12, 12))
    for token, cells in ((0, page[0, :side, :side]), (12 // side + 1, page[0, side : 2 * side, side : 2 * side])):
        said = code(page, side)[0, token] - places.table(12 // side)[token]
        filled = [(label, turn.float()) for label, turn in zip(cells.flatten(), turns, strict=True) if label]
        expected = sum(code.label[label] @ turn for label, turn in filled)
        torch.testing.assert_close(said, expected)


def test_arms_without_compression_need_a_decoder_that_reads_single_cells() -> None:
    reads = {"2": {"1": 0.7, "2": 0.9}, "3": {"1": 0.9, "3": 0.7}}
    level = replace(LEVEL, reads_enough=0.8)
    run = [arm.name for arm in SUITES["table5a"] if arm.ratio < 16 and reads_tokens(arm, reads, level)]
    assert run == ["pooled 1/4", "pooled 1/4 + VR"]


def test_arms_of_a_ratio_that_no_decoder_reads_are_left_out(tmp_path: Path) -> None:
    results = tmp_path / "lines.jsonl"
    run_suites(["table5a"], [0], replace(LEVEL, reads_enough=1.01), tmp_path / "cache", results, 1)
    assert read_lines(results) == []
    assert set(json.loads(stages_file(results).read_text())["reads"]) == {"2", "3", "4"}


@pytest.mark.parametrize("kind", ["parameters", "compute"])
def test_controls_are_as_large_as_the_block(kind: Any) -> None:
    shape = CPU.shape
    words = build_words(LEVEL)
    model = build_model(shape, len(words), 0)
    pretrained = {2: Pretrained(model.state_dict(), TokenPlaces(shape.grid, shape.text_width).state_dict())}
    remember = build_arm(ArmSpec("vr", layers=(1, 4)), shape, len(words), pretrained, 0)
    control = build_arm(ArmSpec("mlp", layers=(1, 4), control=kind), shape, len(words), pretrained, 0)
    block = remember.model.model.language_model.layers[1].vision_remember
    if kind == "parameters":
        assert control.parameters["blocks"] == pytest.approx(remember.parameters["blocks"], rel=0.01)
    else:
        interaction = block.interaction
        cells, tokens = 144, 36
        products = sum(
            p.numel() * (cells if name.startswith(("vr_key", "vr_value")) else tokens)
            for name, p in interaction.named_parameters()
            if p.ndim == 2
        )
        hidden = control.model.model.language_model.layers[1].mlp_control.up.out_features
        assert 2 * shape.text_width * hidden * tokens == pytest.approx(products, rel=0.05)


def test_every_claim_names_two_arms_of_the_suites() -> None:
    names = {arm.name for arms in [*SUITES.values(), SEARCHED] for arm in arms} | set(INTERACTION_NAMES.values())
    assert {claim.better for claim in CLAIMS} | {claim.worse for claim in CLAIMS} <= names


def test_a_run_is_named_by_the_decoders_behind_it_alone() -> None:
    """A decoder of another ratio that trains for longer makes no run of this one anew."""
    longer = replace(LEVEL, decoders=(*LEVEL.decoders[:-1], replace(LEVEL.decoders[-1], steps=99)))
    for arm in SUITES["table5a"]:
        same = Job(arm, 0).key(LEVEL) == Job(arm, 0).key(longer)
        assert same == (arm.ratio != LEVEL.decoders[-1].side ** 2)


def test_equal_arms_of_two_tables_are_run_once() -> None:
    arms = [arm for suite in ("table2", "table4a", "table5a", "controls") for arm in SUITES[suite]]
    kept = distinct(arms)
    assert len({json.dumps(arm.recipe(), sort_keys=True) for arm in arms}) == len(kept) < len(arms)


def test_means_and_pairs_agree_with_scipy() -> None:
    values = [61.0, 64.5, 58.25, 66.0, 63.0]
    low, high = stats.t.interval(0.95, len(values) - 1, statistics.fmean(values), stats.sem(values))
    mean = mean_of(values)
    assert (mean.value - mean.half, mean.value + mean.half) == pytest.approx((low, high))
    assert mean_of([50.0]).half is None
    ours = [{"seed": s, "test": {"a": 0.5 + 0.1 * s, "b": 0.75}} for s in (0, 1, 2)]
    theirs = [{"seed": s, "test": {"a": 0.5, "b": 0.5 + 0.05 * s}} for s in (1, 2, 3)]
    found = compared(ours, theirs, ["a", "b"])
    expected = stats.ttest_rel([67.5, 72.5], [52.5, 55.0])  # of seeds 1 and 2, over tasks
    low, high = expected.confidence_interval(0.95)
    assert (found.difference.value, found.p) == (pytest.approx(16.25), pytest.approx(expected.pvalue))
    assert (found.difference.value - found.difference.half, high) == (pytest.approx(low), pytest.approx(high))
    assert f"{found.difference:+}" == f"+16.2 ± {(high - low) / 2:.1f}"
    assert found.verdict == "holds"
    assert compared(theirs, ours, ["a", "b"]).verdict == "the opposite holds"
    assert compared(ours, ours, ["a"]).verdict == "does not hold"
    assert compared(ours[:2], theirs[:1], ["a"]).verdict == "undecided"  # a single seed in common
    assert [Comparison(mean_of([1, 2]), p).verdict for p in (0.0499, 0.05)] == ["holds", "undecided"]
    shifted = [{**line, "test": {task: score - 0.1 for task, score in line["test"].items()}} for line in ours]
    found = compared(ours, shifted, ["a", "b"])  # equal up to rounding: nothing to test against
    assert (found.p, found.verdict) == (None, "undecided")
    with pytest.raises(ValueError, match="expected one that both arms have"):
        compared(ours[:1], theirs, ["a"])


def test_no_worse_is_tested_against_the_loss_that_is_allowed() -> None:
    base = [{"seed": s, "test": {"a": 0.5 + 0.01 * s, "b": 0.5}} for s in range(6)]
    wobbling = [{"seed": s, "test": {"a": 0.5 + 0.01 * s + 0.002 * (-1) ** s, "b": 0.5}} for s in range(6)]
    assert compared(wobbling, base, ["a", "b"]).verdict == "undecided"  # as good, but not better
    found = compared(wobbling, base, ["a", "b"], margin=1.0)
    differences = [0.1, -0.1] * 3
    assert found.p == pytest.approx(float(stats.ttest_1samp(differences, -1.0).pvalue))
    assert found.verdict == "holds"
    lower = [{**line, "test": {t: v - 0.05 for t, v in line["test"].items()}} for line in wobbling]
    assert compared(lower, base, ["a", "b"], margin=1.0).verdict == "the opposite holds"
    assert compared(base, base, ["a"], margin=1.0).verdict == "holds"


def test_what_is_won_back_is_a_share_of_what_was_lost() -> None:
    def arm(accuracy: float) -> list[dict[str, Any]]:
        return [{"seed": 0, "test": {"a": accuracy}}]

    found = recovered(arm(0.8), arm(0.4), arm(0.9), ["a"])
    assert found is not None
    assert found.value == pytest.approx(80)
    assert recovered(arm(0.8), arm(0.9), arm(0.9), ["a"]) is None  # of nothing there is no share
    assert recovered(arm(0.8), arm(0.4), [{"seed": 1, "test": {"a": 0.9}}], ["a"]) is None


def test_the_gpu_level_has_the_paper_geometry() -> None:
    assert (GPU.shape.grid, GPU.shape.text_layers) == (24, 12)
    arm = ArmSpec("pooled")
    words = build_words(GPU)
    shape = replace(GPU.shape, vision_width=32, text_width=32)
    model = build_model(shape, len(words), 0)
    pretrained = {2: Pretrained(model.state_dict(), TokenPlaces(24, 32).state_dict())}
    assert build_arm(arm, shape, len(words), pretrained, 0).tokens == 144
