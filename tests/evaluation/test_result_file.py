"""The command and its result file, with a small model on local files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tenacity
import torch

from benchmarks import evaluation, result_file
from benchmarks.local_tasks import write_local_data
from benchmarks.official_tasks import BENCHMARKS, choose, write_local_tasks
from benchmarks.paper_tables import COLUMNS, average, group_averages
from tests.evaluation.models import small_model
from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.lmms_eval import LmmsEvalModel

ROOT = Path(__file__).resolve().parents[2]
ENDS = list(range(2, 60, 3))  # every third letter: CVBench grants 1024 tokens, and a random model would take them
SHORT = "DocVQA,scienceqa_img,General"
SHORT_NAMES = ["DocVQA", "SQA-I", "GQA", "MME-P"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``adapter`` and ``data``."""
    folder = tmp_path_factory.mktemp("evaluation")
    model, processor = small_model(compressed=False, remember=False)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    attachment = find_attachment(small := small_model()[0])
    assert attachment is not None
    assert attachment.model is small
    VisionRememberHandle(attachment).save_pretrained(folder / "adapter")
    write_local_data(folder / "data", pictures=2)
    return folder


def command(folder: Path, output: Path, *more: str) -> int:
    model = ["--pretrained", f"{folder / 'base'}", "--device", "cpu", "--dtype", "float32", "--batch-size", "2"]
    data = ["--data", f"{folder / 'data'}", "--tasks", SHORT, "--limit", "2"]
    return evaluation.main([*model, *data, "--output", str(output), *more])


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Any]:
    assert command(folder, folder / "plain.json") == 0
    return result_file.read(folder / "plain.json")


@pytest.fixture(scope="module")
def remembered(folder: Path, plain: dict[str, Any]) -> dict[str, Any]:
    more = ["--adapter", f"{folder / 'adapter'}", "--attn-implementation", "eager", "--ttft"]
    assert command(folder, folder / "with.json", *more, "--baseline", f"{folder / 'plain.json'}") == 0
    return result_file.read(folder / "with.json")


def test_the_file_says_how_it_was_made(remembered: dict[str, Any], folder: Path) -> None:
    assert remembered["harness"] == {"name": "lmms-eval", "version": version("lmms-eval")}
    assert remembered["versions"]["torch"] == torch.__version__
    assert remembered["versions"]["transformers"] == version("transformers")
    assert remembered["limit"] == 2
    assert set(remembered["seeds"].values()) == {1234}
    settings = remembered["settings"]
    assert settings["pretrained"] == str(folder / "base")
    assert settings["adapter"] == str(folder / "adapter")
    assert settings["vision_remember"]["layers"] == [1, 2]
    assert settings["dtype"] == "float32"
    assert set(settings["attn_implementation"].values()) == {"eager"}
    assert "{% for message in messages %}" in settings["chat_template"]


def test_each_benchmark_says_prompt_arguments_and_tokens(remembered: dict[str, Any], plain: dict[str, Any]) -> None:
    assert list(remembered["benchmarks"]) == list(plain["benchmarks"]) == SHORT_NAMES
    row = remembered["benchmarks"]["GQA"]
    question = "What color is the square?\nAnswer the question using a single word or phrase."
    assert row["first_question"] == question
    assert row["prompt"] == f"user: <image>\n{question}\nassistant:"
    assert row["generation"] == {"max_new_tokens": 16, "num_beams": 1, "do_sample": False, "until": []}
    assert (row["task"], row["group"], row["metric"]) == ("gqa_local", "General", "exact_match,none")
    assert row["vision_tokens"] == {"mean": 16, "min": 16, "max": 16}
    assert plain["benchmarks"]["GQA"]["vision_tokens"] == {"mean": 64, "min": 64, "max": 64}
    assert row["prompt_tokens"]["mean"] == len(row["prompt"].replace("<image>", "")) + 16
    assert row["first_token_ms"]["mean"] > 0
    assert plain["benchmarks"]["GQA"]["first_token_ms"] is None
    assert len(row["answers"]) == len(row["sample_scores"]) == len(row["documents"]) == row["samples"] == 2


def test_averages_are_computed_from_what_ran(plain: dict[str, Any]) -> None:
    scores = {name: row["score"] for name, row in plain["benchmarks"].items()}
    assert plain["average"]["value"] == pytest.approx(average(scores))
    assert plain["average"]["of"] == 4
    assert plain["groups"] == group_averages(scores)
    assert list(plain["groups"]) == ["General"]


def test_a_run_is_compared_with_its_baseline(remembered: dict[str, Any], plain: dict[str, Any]) -> None:
    comparison = remembered["comparison"]
    for name in ("DocVQA", "SQA-I", "GQA"):  # MME's score is no mean of samples
        ours, theirs = remembered["benchmarks"][name], plain["benchmarks"][name]
        assert comparison["benchmarks"][name]["sample_difference"] == pytest.approx(ours["score"] - theirs["score"])
    differs = set(comparison["also_differs"])
    assert differs == {"settings.attn_implementation", *(f"{name}.vision_tokens" for name in SHORT_NAMES)}
    assert any(
        remembered["benchmarks"][name]["answers"] != plain["benchmarks"][name]["answers"] for name in SHORT_NAMES
    )


def test_the_table_names_every_score(remembered: dict[str, Any]) -> None:
    lines = evaluation.table(remembered).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == SHORT_NAMES
    assert lines[5].startswith("average")
    assert any(line.startswith("against ") for line in lines)
    assert "settings.attn_implementation" in lines[-1]


def report(scores: list[float], documents: list[str] | None = None, **settings: Any) -> dict[str, Any]:
    row = {
        "score": 100 * sum(scores) / len(scores),
        "samples": len(scores),
        "sample_scores": scores,
        "documents": documents or [str(i) for i in range(len(scores))],
    }
    return {"harness": {}, "versions": {}, "seeds": {}, "settings": settings, "benchmarks": {"GQA": row}}


def test_the_paired_test_is_the_textbooks() -> None:
    ours, theirs = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    row = result_file.compare(report(ours), report(theirs))["benchmarks"]["GQA"]
    differences = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    error = differences.std() / len(ours) ** 0.5
    half = 2.570581835636314 * error  # Student's t, five degrees of freedom, 97.5 %
    assert row["sample_difference"] == pytest.approx(100 * float(differences.mean()))
    low, high = (100 * float(differences.mean() + sign * half) for sign in (-1, 1))
    assert row["interval"] == [pytest.approx(low), pytest.approx(high)]
    assert row["p_value"] == pytest.approx(0.6108, abs=1e-3)


def test_equal_runs_have_no_p_value() -> None:
    comparison = result_file.compare(report([1.0, 0.0], dtype="float32"), report([1.0, 0.0], dtype="bfloat16"))
    row = comparison["benchmarks"]["GQA"]
    assert (row["sample_difference"], row["interval"], row["p_value"]) == (0, None, None)
    assert comparison["also_differs"] == ["settings.dtype"]


def test_other_documents_are_not_compared() -> None:
    with pytest.raises(ValueError, match="GQA: the baseline's 2 documents are not the 2 of this run"):
        result_file.compare(report([1.0, 0.0]), report([1.0, 0.0], ["0", "x"]))
    with pytest.raises(ValueError, match="the baseline has nothing, the run GQA"):
        result_file.compare(report([1.0]), {"benchmarks": {"nothing": {}}})


def test_a_result_file_is_not_replaced_by_accident(
    plain: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "plain.json").read_bytes()
    assert command(folder, folder / "plain.json") == 2
    assert "plain.json is there already: name another --output, or pass --overwrite" in capsys.readouterr().err
    assert (folder / "plain.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gqa,mme,sqa"], "unknown benchmark 'sqa'"),
        (["--output", "{folder}", "--overwrite"], "is a folder: name a file for --output"),
        (["--limit", "0"], "limit=0: expected at least one document"),
        (["--limit", "3"], "limit=3: MME-P is scored in pairs of questions"),
        (["--baseline", "{folder}/nothing.json"], "nothing.json"),
        (["--baseline", "{folder}/base/config.json"], "expected a result file with format 1, got None"),
        (["--baseline", "{folder}/base/model.safetensors"], "model.safetensors: expected a result file, which is JSON"),
        (["--pretrained", "nowhere"], "nowhere is neither a folder nor a repository id"),
        (["--device", "abacus"], "device 'abacus': expected one that this machine has"),
        (["--no-blocks"], "blocks=False: there is no adapter whose blocks could be left out"),
        (["--dtype", "int4"], "dtype='int4': expected auto, float32"),
    ],
)
def test_mistakes_are_found_before_the_model_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [argument.format(folder=folder) for argument in arguments]
    assert command(folder, tmp_path / "new.json", *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new.json").exists()


def test_data_that_cannot_be_had_are_an_error_with_a_way_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_network(*args: Any, **options: Any) -> None:
        attempt = tenacity.Future(1)
        attempt.set_exception(ConnectionError("the hub is out of reach"))
        raise tenacity.RetryError(attempt)

    monkeypatch.setattr("lmms_eval.evaluator.simple_evaluate", without_network)
    assert command(folder, tmp_path / "new.json", "--tasks", "GQA,TextVQA") == 2
    error = capsys.readouterr().err
    assert "gqa_local, textvqa_val_local: lmms-eval could not load the data" in error
    assert "(the hub is out of reach); --data FOLDER reads local files" in error


def test_no_number_that_is_none_is_written(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    result_file.write({"format": 1, "score": 1.0}, file)
    with pytest.raises(ValueError, match="JSON"):
        result_file.write({"format": 1, "score": float("nan")}, file)
    assert json.loads(file.read_text()) == {"format": 1, "score": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_benchmarks_go_by_many_names() -> None:
    assert [benchmark.name for benchmark in choose("paper")] == list(COLUMNS)
    assert [benchmark.name for benchmark in choose("General, cv_bench_3d,GQA")] == ["GQA", "MME-P", "CVBench-3D"]
    assert all(choose(benchmark.task) == [benchmark] for benchmark in BENCHMARKS.values())


def test_lmms_evals_own_command_runs_the_plugin(folder: Path, tmp_path: Path, plain: dict[str, Any]) -> None:
    write_local_tasks([BENCHMARKS["GQA"]], folder / "data", tmp_path / "tasks")
    model = ["--model", "vision_remember", "--model_args", f"pretrained={folder / 'base'},dtype=float32"]
    tasks = ["--include_path", str(tmp_path / "tasks"), "--tasks", "gqa_local", "--batch_size", "2", "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, "-m", "lmms_eval", "eval", *model, *tasks, "--log_samples", "--output_path", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "|gqa_local|" in run.stdout, run.stdout + run.stderr
    (samples,) = tmp_path.rglob("*_samples_gqa_local.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    assert sorted(answers) == sorted(plain["benchmarks"]["GQA"]["answers"])
    assert len(answers) == 2
    assert any(answers)


def test_all_13_tasks_ask_the_small_model(folder: Path, tmp_path: Path) -> None:
    model, processor = small_model()
    model.generation_config.eos_token_id = ENDS
    lm = LmmsEvalModel(model, processor=processor, batch_size=2, max_new_tokens=8)
    made = evaluation.evaluate(lm, BENCHMARKS.values(), folder=tmp_path, data=folder / "data", limit=2)
    assert made is not None
    assert list(made["benchmarks"]) == list(COLUMNS)
    assert all(row["vision_tokens"] == {"mean": 16, "min": 16, "max": 16} for row in made["benchmarks"].values())
    assert all(row["requests"] == row["samples"] == 2 for row in made["benchmarks"].values())
    assert set(made["groups"]) == {"General", "Knowledge", "OCR & Chart", "Vision-Centric"}
