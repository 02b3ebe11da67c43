"""The 13 official tasks on local files: full marks for a model that knows, chance for one that does not see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lmms_eval.tasks
import pytest
from lmms_eval.tasks import TaskManager

from benchmarks import offline_proof
from benchmarks.evaluation import evaluate
from benchmarks.local_tasks import LOCAL_TASKS, rows
from benchmarks.official_tasks import BENCHMARKS
from benchmarks.paper_tables import COLUMNS
from benchmarks.reference_models import Oracle

each = pytest.mark.parametrize("name", COLUMNS)


class OnceWrong(Oracle):
    """Knows every answer but the first of each task."""

    def generate_until(self, requests: Any) -> list[str]:
        answers = super().generate_until(requests)
        first = {request.args[-2]: index for index, request in reversed(list(enumerate(requests)))}
        for index in first.values():
            answers[index] = {"A": "B", "(A)": "(B)", "Yes": "No"}.get(answers[index], "nothing like it")
        return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proof")


@pytest.fixture(scope="module")
def reports(folder: Path) -> dict[str, Any]:
    found = offline_proof.prove(folder)
    found["once wrong"] = evaluate(
        OnceWrong(), BENCHMARKS.values(), folder=folder / "once-wrong", data=folder / "data"
    ) or pytest.fail("no report")
    return found


@each
def test_the_oracle_scores_full_marks(reports: dict[str, Any], name: str) -> None:
    assert reports["oracle"]["benchmarks"][name]["score"] == (2000 if name == "MME-P" else 100)


@each
def test_the_blind_model_scores_chance(reports: dict[str, Any], name: str) -> None:
    made = rows(BENCHMARKS[name], 16)
    if name == "MME-P":
        chance = 10 * 50  # right once in every pair, and so never in both
    else:
        chance = 100 / len({LOCAL_TASKS[name].answer(row) for row in made})
        options = made[0].get("choices") or made[0].get("options")
        assert chance == (25 if options is None or isinstance(options, str) else 100 / len(options))
    assert reports["blind"]["benchmarks"][name]["score"] == pytest.approx(chance)
    assert LOCAL_TASKS[name].chance == chance


@each
def test_one_wrong_answer_costs_what_the_official_metric_says(reports: dict[str, Any], name: str) -> None:
    row = reports["once wrong"]["benchmarks"][name]
    expected = 100 * (1 - 1 / row["samples"])
    if name == "MME-P":
        # two pictures in that category: 200 points for one of them, half the accuracy and no pair for the other
        expected = 9 * 200 + (200 + 50) / 2
    assert row["score"] == pytest.approx(expected, abs=1e-3)  # MMMU's is rounded to five digits
    assert row["sample_scores"].count(0.0) == 1
    assert row["sample_scores"][0] == 0.0


@each
def test_sample_scores_average_to_the_score(reports: dict[str, Any], name: str) -> None:
    for report in reports.values():
        row = report["benchmarks"][name]
        mean = 100 * sum(row["sample_scores"]) / len(row["sample_scores"])
        if name == "MME-P":
            accuracy = {100.0: 2000, 50.0: 500, 100 * (1 - 1 / 32): 1925}
            assert accuracy[mean] == row["score"]
        else:
            assert mean == pytest.approx(row["score"], abs=1e-3)


def test_the_averages_are_the_papers(reports: dict[str, Any]) -> None:
    assert reports["oracle"]["average"]["value"] == 100
    assert reports["blind"]["average"]["value"] == pytest.approx(25)
    assert reports["blind"]["groups"] == {name: pytest.approx(25) for name in reports["oracle"]["groups"]}
    assert len(reports["blind"]["groups"]) == 4


def test_every_document_gets_its_official_prompt(reports: dict[str, Any]) -> None:
    asked = {name: row["first_question"] for name, row in reports["oracle"]["benchmarks"].items()}
    letter = "Answer with the option's letter from the given choices directly"
    phrase = "Answer the question using a single word or phrase."
    assert all(letter in asked[name] for name in ("MMStar", "MMMU", "SQA-I", "AI2D"))
    assert all(asked[name].endswith(phrase) for name in ("GQA", "MME-P", "DocVQA", "TextVQA"))
    assert asked["ChartQA"] == "How high is the bar?\nAnswer the question with a single word."
    assert asked["CVBench-2D"].startswith("Note: You only need to respond with A, B, C, D without")


def test_rows_hold_nothing_that_their_task_does_not_read() -> None:
    for benchmark in BENCHMARKS.values():
        files = (Path(lmms_eval.tasks.__file__).parent / benchmark.file).parent.iterdir()
        code = "".join(file.read_text() for file in files if file.is_file() and file.suffix != ".ttf")
        for column in set(benchmark.columns) - {"image_1"}:  # MMMU's prompt names its pictures
            assert re.search(rf"[\"']{column}[\"']", code), (benchmark.name, column)


def test_the_tasks_are_those_that_lmms_eval_lists() -> None:
    known, folder = TaskManager("WARNING").task_index, Path(lmms_eval.tasks.__file__).parent
    for benchmark in BENCHMARKS.values():
        assert Path(known[benchmark.task]["yaml_path"]) == folder / benchmark.file


def test_tasks_write_into_their_folder_alone(
    reports: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two = [BENCHMARKS["TextVQA"], BENCHMARKS["OCRBench"]]  # these write submission files
    assert evaluate(Oracle(), two, folder=tmp_path / "files", data=folder / "data") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gqa\.parquet: expected one parquet file for each task"):
        evaluate(Oracle(), [BENCHMARKS["GQA"]], folder=tmp_path, data=tmp_path)


def test_the_command_prints_the_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert offline_proof.main(["--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[-14:]] == [*COLUMNS, "average"]
    assert shown[-1].split() == ["average", "100.0", "25.0"]
