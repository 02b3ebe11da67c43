"""The speed benchmark runs every suite, and what it writes is what it measured. No time is asserted."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.speed.__main__ import SUITES, main
from benchmarks.speed.measure import Plan, measure, quartiles

FIRST = {
    "op": "regions",
    "absorb": "projecting",
    "block": "their products",
    "ttft": "pooled",
    "train": "pooled",
    "capture": "encoder alone",
}


@pytest.fixture(autouse=True)
def _threads_as_before():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_writes_ratios_to_its_first_candidate(suite: str, tmp_path: Path) -> None:
    main(["--suite", suite, "--small", "--repeats", "2", "--output", str(tmp_path)])
    written = json.loads((tmp_path / f"speed_cpu_{suite}.json").read_text())
    assert written["plan"] == {"device": "cpu", "repeats": 2, "small": True, "seed": 0, "graphs": False}
    assert written["torch"] == torch.__version__
    assert {"date", "transformers", "machine", "threads", "clock"} <= set(written)
    results = written["results"]
    assert not [result for result in results if "failure" in result]
    for case in {result["case"] for result in results}:
        first, *others = [result for result in results if result["case"] == case]
        assert first["name"] == FIRST[suite]
        assert first["ratio"] == 1
        assert others
        for result in others:
            assert len(result["times"]) == 2
            assert sum(result["times"]) / 2 == pytest.approx(result["milliseconds"])
            assert 0 < result["quartiles"][0] <= result["milliseconds"] <= result["quartiles"][1]
            assert result["peak_bytes"] > 0
    assert (tmp_path / f"speed_cpu_{suite}.png").stat().st_size > 1000


def test_first_tokens_after_several_tiles_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    chosen = ["--suite", "ttft", "--decoder", "tiny", "--tiles", "2", "--tiles", "3", "--arm", "uncompressed"]
    main([*chosen, "--repeats", "1", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "speed_cpu_ttft_tiny_x2_x3.json").read_text())["results"]
    found = [(result["case"], result["name"]) for result in results]
    assert found == [(case, name) for case in ("tiny x2", "tiny x3") for name in ("pooled", "uncompressed")]


@pytest.mark.parametrize("values", [[7.0], [1.0, 100.0], [1.0, 2.0, 100.0], [3.0, 1.0, 2.0, 50.0, 4.0]])
def test_quartiles_lie_among_what_was_measured(values: list[float]) -> None:
    low, high = quartiles(values)
    assert min(values) <= low <= statistics.median(values) <= high <= max(values)


def test_a_candidate_that_cannot_run_here_is_named_and_the_others_are_measured() -> None:
    def unable() -> None:
        raise NotImplementedError("no such kernel")

    runs: list[str] = []
    candidates = {"one": lambda: runs.append("one"), "unable": unable, "two": lambda: runs.append("two")}
    one, two, failed = measure(Plan(repeats=3), "case", candidates)
    assert (one.name, two.name, failed.failure) == ("one", "two", "NotImplementedError: no such kernel")
    # Two to warm up, one for the peak, three repeats.
    assert runs.count("one") == runs.count("two") == 6


def test_the_peak_is_what_results_hold_at_once() -> None:
    x = torch.ones(1000)

    def run() -> float:
        y = x + 1  # 4000 bytes, and as many for the next before these go
        y = y * 2
        return y[:10].sum().item()

    (result,) = measure(Plan(repeats=2), "case", {"run": run})
    assert 8000 <= (result.peak_bytes or 0) < 8100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "operator"], "invalid choice"),
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--threads", "0"], "--threads 0: expected at least 1"),
        (["--tiles", "0"], "--tiles 0: expected at least 1"),
        (["--suite", "ttft", "--decoder", "Qwen3"], "invalid choice: 'Qwen3'"),
        (["--graphs"], "--graphs: expected with --device cuda"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "this torch sees no CUDA device")]),
    ],
)
def test_arguments_that_do_not_fit_are_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
