"""The paper's benchmarks by lmms-eval, with a result file that can be repeated and compared.

``python -m benchmarks.evaluation --pretrained BASE --adapter ADAPTER --tasks paper --output with.json``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import result_file
from benchmarks.official_tasks import Benchmark, choose, write_local_tasks

SEED = 1234


def evaluate(
    model: Any,
    benchmarks: Iterable[Benchmark],
    *,
    folder: Path,
    data: Path | None = None,
    limit: int | None = None,
    seed: int = SEED,
) -> dict[str, Any] | None:
    """Runs benchmarks and returns the content of a result file.

    Args:
        model: a model of lmms-eval: the plug-in's, with any transformers model in it, or another.
        benchmarks: which.
        folder: for what the tasks write (submission files) and for the cache of local data.
        data: folder of ``<task>.parquet`` to read instead of the hub.
        limit: only so many documents of each.
        seed: of Python, NumPy and torch.

    Returns:
        None on all processes but the first.

    Raises:
        FileNotFoundError: local data are not there.
        ConnectionError: a task's data are neither in the cache nor to be had.
        ValueError: a limit that cannot be.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from tenacity import RetryError

    benchmarks = list(benchmarks)
    _check_limit(limit, benchmarks)
    tasks = {benchmark.task if data is None else benchmark.local_task: benchmark for benchmark in benchmarks}
    include = None
    if data is not None:
        include = folder / "tasks"
        write_local_tasks(tasks.values(), data, include)
    manager = TaskManager(
        "WARNING", include_path=None if include is None else str(include), include_defaults=include is None
    )
    records = getattr(model, "records", {})
    records.clear()
    try:
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            # without these two the tasks write into the current folder, and decode every picture again to score
            cli_args=argparse.Namespace(output_path=str(folder), process_with_media=False),
        )
    except RetryError as error:
        if isinstance(cause := error.last_attempt.exception(), OSError):
            raise ConnectionError(
                f"{', '.join(tasks)}: lmms-eval could not load the data of one of them ({cause}); --data FOLDER reads "
                "local files"
            ) from error
        raise
    if results is None:
        return None
    settings = model.settings() if hasattr(model, "settings") else {"model_class": type(model).__name__}
    return result_file.build(results, tasks, settings, {task: record.to_dict() for task, record in records.items()})


def _check_limit(limit: int | None, benchmarks: Iterable[Benchmark]) -> None:
    """Raises ValueError for a limit that no task, or not all of them, can be scored with."""
    if limit is None:
        return
    if limit < 1:
        raise ValueError(f"limit={limit}: expected at least one document")
    if limit % 2 and "MME-P" in [benchmark.name for benchmark in benchmarks]:
        raise ValueError(f"limit={limit}: MME-P is scored in pairs of questions; choose an even number")


def table(report: Mapping[str, Any]) -> str:
    """Scores, averages and, if there is one, the comparison, for reading."""
    lines = [f"{'benchmark':<12} {'score':>8} {'samples':>8} {'vision tokens':>14}"]
    for name, row in report["benchmarks"].items():
        tokens = row.get("vision_tokens")
        shown = f"{tokens['mean']:.0f}" if tokens else "-"
        lines.append(f"{name:<12} {row['score']:>8.1f} {row['samples']:>8} {shown:>14}")
    lines.append(f"{'average':<12} {report['average']['value']:>8.1f} (of {report['average']['of']}, MME-P / 20)")
    lines += [f"{group:<16} {value:>4.1f}" for group, value in report["groups"].items()]
    if comparison := report.get("comparison"):
        lines += ["", f"against {comparison['file']}: {comparison['average_difference']:+.1f} on average"]
        for name, row in comparison["benchmarks"].items():
            low_high = "" if row["interval"] is None else "  95 %: {:+.1f} .. {:+.1f}".format(*row["interval"])
            p_value = "" if row["p_value"] is None else f"  p = {row['p_value']:.3f}"
            lines.append(f"{name:<12} {row['sample_difference']:>+8.1f}{low_high}{p_value}")
        if comparison["also_differs"]:
            lines.append(f"the two runs also differ in {', '.join(comparison['also_differs'])}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        report = _run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if report is not None:
        print(table(report))
        print(f"written: {arguments.output}")
    return 0


def _run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """All that can be wrong is looked at before the model is loaded."""
    benchmarks = choose(arguments.tasks)
    output: Path = arguments.output
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder: name a file for --output")
    if output.exists() and not arguments.overwrite:
        raise FileExistsError(f"{output} is there already: name another --output, or pass --overwrite")
    baseline = None if arguments.baseline is None else result_file.read(arguments.baseline)
    _check_limit(arguments.limit, benchmarks)
    output.parent.mkdir(parents=True, exist_ok=True)

    from vision_remember.adapters.lmms_eval import LmmsEvalModel

    model = LmmsEvalModel(
        arguments.pretrained,
        arguments.adapter,
        revision=arguments.revision,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn_implementation,
        device=arguments.device,
        device_map=arguments.device_map,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        chat_template=arguments.chat_template,
        system_prompt=arguments.system_prompt,
        blocks=not arguments.no_blocks,
        ttft=arguments.ttft,
    )
    report = evaluate(
        model,
        benchmarks,
        folder=output.with_name(output.stem + "_files"),
        data=arguments.data,
        limit=arguments.limit,
        seed=arguments.seed,
    )
    if report is None:
        return None
    # first without the comparison: hours of answers must not depend on what the baseline holds
    result_file.write(report, output)
    if baseline is not None:
        report["comparison"] = {"file": str(arguments.baseline), **result_file.compare(report, baseline)}
        result_file.write(report, output)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--pretrained", required=True, help="base model: hub id or folder")
    add("--adapter", help="Vision Remember adapter: folder or hub id; without one the base model runs plain")
    add("--no-blocks", action="store_true", help="the adapter's projector without its blocks")
    add("--revision", help="of the base model")
    add("--tasks", default="paper", help="'paper' for all 13, or benchmarks, groups or lmms-eval tasks, by comma")
    add("--data", type=Path, help="folder of <task>.parquet to read instead of the hub")
    add("--limit", type=int, help="only so many documents of each benchmark")
    add("--output", type=Path, default=Path("evaluation.json"), help="result file (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace a result file that is there")
    add("--baseline", type=Path, help="result file of another run to compare with, sample by sample")
    add("--batch-size", type=int, default=1)
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--attn-implementation", help="sdpa, eager, flash_attention_2 ...")
    add("--device", help="cpu, cuda, cuda:1 ...; default: the GPU if there is one")
    add("--device-map", help="in the place of --device: auto, balanced ...")
    add("--max-new-tokens", type=int, default=1024, help="for tasks that name no number (default: %(default)s)")
    add("--chat-template", help="in the place of the processor's: text or file")
    add("--system-prompt", default="", help="text or file")
    add("--ttft", action="store_true", help="measure the time to the first token")
    add("--seed", type=int, default=SEED)
    return parser


if __name__ == "__main__":
    sys.exit(main())
