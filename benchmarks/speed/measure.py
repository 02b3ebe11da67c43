"""Interleaved timing: each repeat runs all candidates, in random order, so that a busy machine slows all alike."""

from __future__ import annotations

import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

_WARM_UP = 2
# A replay that ends sooner is timed several times in a row: a GPU's events tell half a microsecond.
_SHORTEST_MS, _MOST_REPLAYS = 2.0, 100


@dataclass(frozen=True)
class Result:
    """One candidate in one case.

    Attributes:
        case: what was measured, such as the grids.
        name: the candidate.
        milliseconds: median time.
        quartiles: first and third quartile of the time.
        ratio: median over repeats of its time by that of the first candidate in the same repeat.
        ratio_quartiles: of that ratio.
        times: of each repeat, in their order: what any other ratio within repeats is taken from.
        peak_bytes: most bytes that its results held at once, beyond what was there before.
        failure: why there are no numbers.
    """

    case: str
    name: str
    milliseconds: float | None = None
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    times: tuple[float, ...] | None = None
    peak_bytes: int | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        repeats: interleaved repeats.
        small: miniature sizes, which show that a suite runs and nothing else.
        seed: of the order inside the repeats.
        graphs: capture every candidate as a CUDA graph and time its replays: what a GPU computes, without the time that
            a host takes to ask for it.
    """

    device: str = "cpu"
    repeats: int = 11
    small: bool = False
    seed: int = 0
    graphs: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and features: what is usual on such a device."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


class PeakBytes(TorchDispatchMode):
    """Most bytes that results of operators held at once; on a CPU nothing else tells."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}
        self._given: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (storage := StorageWeakRef(tensor.untyped_storage())) not in self._alive:
                self._given.add(storage)
        result = func(*args, **(kwargs or {}))
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := StorageWeakRef(tensor.untyped_storage())) not in self._given:
                self._alive.setdefault(storage, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def measure(
    plan: Plan, case: str, candidates: dict[str, Callable[[], Any]], *, repeats: int | None = None
) -> list[Result]:
    """Times the candidates; the first is what the others are compared with.

    On a CPU the clock is the process's CPU time, which other processes do not add to; on a GPU its own events, after
    everything before has ended, around the call or around replays of its graph (`Plan.graphs`).
    """
    failures: dict[str, str] = {}
    peaks: dict[str, int] = {}
    runs: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, run in candidates.items():
        try:
            for _ in range(_WARM_UP):
                run()
            peaks[name] = _peak(plan, run)
            runs[name] = _replaying(run) if plan.graphs else (run, 1)
        except (NotImplementedError, RuntimeError, ImportError) as error:
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    able = list(runs)
    times: dict[str, list[float]] = {name: [] for name in able}
    shuffle = random.Random(plan.seed).shuffle
    for _ in tqdm(range(repeats or plan.repeats), desc=case, leave=False):
        order = list(able)
        shuffle(order)
        for name in order:
            times[name].append(_time(plan, *runs[name]))
    results = [_result(case, name, times[name], times[able[0]], peaks[name]) for name in able]
    return results + [Result(case, name, failure=failure) for name, failure in failures.items()]


def about(plan: Plan) -> dict[str, Any]:
    """What a reader needs to know to judge the numbers."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "plan": asdict(plan),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": torch.cuda.get_device_name() if plan.device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "clock": _clock(plan),
    }


def _clock(plan: Plan) -> str:
    if plan.device == "cpu":
        return "CPU time of the process"
    return "CUDA events around replays of a CUDA graph" if plan.graphs else "CUDA events"


def _replaying(run: Callable[[], Any]) -> tuple[Callable[[], Any], int]:
    """The replay of a CUDA graph of ``run``, and how many in a row are worth timing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    once = _cuda_time(graph.replay, 1)
    return graph.replay, max(1, min(_MOST_REPLAYS, math.ceil(_SHORTEST_MS / max(once, 1e-3))))


def _cuda_time(run: Callable[[], Any], times: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / times


def _time(plan: Plan, run: Callable[[], Any], times: int) -> float:
    if plan.device == "cuda":
        return _cuda_time(run, times)
    before = time.process_time_ns()
    run()
    return (time.process_time_ns() - before) / 1e6


def _peak(plan: Plan, run: Callable[[], Any]) -> int:
    if plan.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as bytes_held:
        run()
    return bytes_held.peak


def _result(case: str, name: str, times: list[float], first: list[float], peak: int) -> Result:
    ratios = [own / other for own, other in zip(times, first, strict=True)]
    return Result(
        case,
        name,
        statistics.median(times),
        quartiles(times),
        statistics.median(ratios),
        quartiles(ratios),
        tuple(times),
        peak,
    )


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 3:  # whose quartiles would lie outside of what was measured
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
