"""Keys and values on a side stream: nothing is read before it is there, nothing is handed out while it is read."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hosts import batch, build_llava, randomise
from tests.launches import fake, moved
from tests.streams import Stream, Streams, standing_in
from vision_remember import VisionRemember, attach_vision_remember, side_stream
from vision_remember.memory import Recall, Span, VisionMemory
from vision_remember.remember import lay_weights_side_by_side, prepare_together

D, LEVEL = 64, 32
FORMS: list[dict[str, Any]] = [
    *({}, {"window": 2}, {"absorb": True}, {"position": "none"}, {"fusion": "tokens"}, {"backend": "triton"})
]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    """In the place of torch.cuda's, none of them left over."""
    made = Streams()
    standing_in(made, monkeypatch)
    side_stream._side_stream.cache_clear()
    yield made
    side_stream._side_stream.cache_clear()


def two_blocks(**options: Any) -> list[VisionRemember]:
    blocks = [VisionRemember(D, 3 * LEVEL, num_levels=3, zero_init=False, **options).eval() for _ in range(2)]
    lay_weights_side_by_side(blocks)
    return blocks


def recall_on(device: str, sizes: int = 1) -> tuple[Recall, Tensor]:
    """A recall of two tiles of each size, with 2x2 cells a token, and hidden states for it."""
    grids = [(4 + 2 * size, 6) for size in range(sizes)]
    counts = [2 * math.prod(grid) for grid in grids]
    places = torch.arange(sum(counts) + 5, device=device)
    recalls = []
    for number, (grid, count) in enumerate(zip(grids, counts, strict=True)):
        cells = (2 * grid[0], 2 * grid[1])
        levels = tuple(torch.randn(2, math.prod(cells), LEVEL, device=device) for _ in range(3))
        saliency = torch.rand(2, math.prod(cells), device=device)
        memory = VisionMemory(levels, saliency, cells, grid, (Span(range(count), range(2)),))
        own = (places >= sum(counts[:number])) & (places < sum(counts[: number + 1]))
        recalls.append(memory.recall_images([0], own.unsqueeze(0)))
    return Recall.joined(recalls), torch.randn(1, len(places), D, device=device)


def on_fake_gpu(options: dict[str, Any], device: str = "cuda:0") -> list[VisionRemember]:
    blocks = [VisionRemember(D, 3 * LEVEL, num_levels=3, **options).eval() for _ in range(2)]
    for block in blocks:
        moved(block, device, torch.float32)
    lay_weights_side_by_side(blocks)
    return blocks


def remember(streams: Streams, options: dict[str, Any], *, sizes: int = 1, device: str = "cuda:0") -> tuple[int, int]:
    """A pass on a GPU that does not exist; how many operators the side stream and the one in front of it did."""
    with fake(device), torch.no_grad():
        blocks = on_fake_gpu(options, device)
        with streams:
            recall, hidden = recall_on(device, sizes)
            recall = recall.prepared(blocks, prepare_together, side_stream=True)
            front, (side,) = streams.current(hidden.device), streams.made
            hidden = hidden @ hidden.new_ones(D, D)  # a layer of the decoder
            assert front.known.get(side, 0) == 0, "waits before it has to"
            for block in blocks:
                hidden = recall.through(block, hidden)
    return streams.operators(side), streams.operators(front)


@pytest.mark.parametrize("sizes", [1, 2])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_nothing_races_and_no_memory_is_handed_out_early(streams: Streams, options: dict[str, Any], sizes: int) -> None:
    beside, _ = remember(streams, options, sizes=sizes)
    assert beside >= 2 * sizes
    assert (streams.races, streams.unreported) == ([], [])


def test_the_streams_are_those_of_the_features_device(streams: Streams) -> None:
    beside, front = remember(streams, {}, device="cuda:1")
    assert min(beside, front) > 0
    assert [str(stream.device) for stream in streams.made] == ["cuda:1"]
    assert (streams.races, streams.unreported) == ([], [])


@pytest.mark.parametrize("missing", ["wait_stream", "wait_event"])
def test_a_wait_that_is_left_out_is_a_race(streams: Streams, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(Stream, missing, lambda *_: None)
    remember(streams, {})
    assert streams.races


def test_an_event_from_before_the_work_is_a_race(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "record_event", lambda _: {})
    remember(streams, {})
    assert streams.races


@pytest.mark.parametrize("side", [True, False], ids=["inputs", "results"])
def test_memory_that_is_not_reported_is_noticed(streams: Streams, monkeypatch: pytest.MonkeyPatch, side: bool) -> None:
    def report(tensor: Tensor, stream: Stream) -> None:
        if (stream in streams.made) != side:
            streams.report(tensor, stream)

    monkeypatch.setattr(Tensor, "record_stream", report)
    remember(streams, {})
    assert not streams.races
    assert streams.unreported


def test_each_stream_that_reads_waits_once(streams: Streams) -> None:
    with fake("cuda:0"), torch.no_grad():
        blocks = on_fake_gpu({})
        with streams:
            recall, hidden = recall_on("cuda:0")
            recall = recall.prepared(blocks, prepare_together, side_stream=True)
            front, other = streams.current(hidden.device), Stream(hidden.device)
            other.wait_stream(front)
            for _ in range(2):
                for block in blocks:
                    recall.through(block, hidden)
            assert (front.waits, other.waits) == (1, 0)
            with streams.on(other):
                for block in blocks:
                    recall.through(block, hidden)
            assert (front.waits, other.waits) == (1, 1)
    assert streams.races == []


def test_passes_share_one_stream(streams: Streams) -> None:
    with fake("cuda:0"), torch.no_grad():
        blocks = on_fake_gpu({})
        with streams:
            for _ in range(3):
                recall, hidden = recall_on("cuda:0")
                recall = recall.prepared(blocks, prepare_together, side_stream=True)
                for block in blocks:
                    hidden = recall.through(block, hidden)
    assert len(streams.made) == 1
    assert streams.races == []


def test_who_reads_nothing_of_it_does_not_wait(streams: Streams) -> None:
    """An interaction without regions is given the levels, which are there."""
    with fake("cuda:0"), torch.no_grad():
        blocks = on_fake_gpu({"interaction": "global"})
        with streams:
            recall, hidden = recall_on("cuda:0")
            recall = recall.prepared(blocks, prepare_together, side_stream=True)
            for block in blocks:
                hidden = recall.through(block, hidden)
    assert streams.current(hidden.device).waits == 0
    assert (streams.races, streams.unreported) == ([], [])


def _compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("why", ["gradients", "compiling", "capturing", "a CPU", "two devices", "nothing"])
def test_where_there_is_no_side_stream(streams: Streams, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "compiling":
        _compiling(monkeypatch)
    streams.capturing = why == "capturing"
    devices = {"a CPU": ["cpu", "cpu"], "two devices": ["cuda:0", "cuda:1"]}.get(why, ["cuda:0", "cuda:0"])
    with fake("cuda:0"), torch.set_grad_enabled(why == "gradients"):
        reads = [torch.empty(2, device=device) for device in devices]
        result = object()
        made, work = side_stream.run_beside(lambda: result, reads)
    assert made is result
    assert (work is None, streams.made == []) == ((False, False) if why == "nothing" else (True, True))


@pytest.mark.parametrize("learning", [False, True])
def test_on_a_cpu_it_changes_nothing(streams: Streams, learning: bool) -> None:
    blocks = two_blocks()
    recall, hidden = recall_on("cpu")
    with torch.set_grad_enabled(learning):
        plain, aside = (recall.prepared(blocks, prepare_together, side_stream=side) for side in (False, True))
        assert aside.side_work is None
        for block in blocks:
            assert torch.equal(aside.through(block, hidden), plain.through(block, hidden))
    assert streams.made == []


def test_compiled_code_is_one_graph_with_it() -> None:
    blocks = two_blocks()
    recall, hidden = recall_on("cpu")

    def run(hidden: Tensor) -> Tensor:
        made = recall.prepared(blocks, prepare_together, side_stream=True)
        for block in blocks:
            hidden = made.through(block, hidden)
        return hidden

    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(hidden), run(hidden))
    torch._dynamo.reset()


@pytest.fixture
def anywhere(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Streams for tensors of a CPU, whose numbers can be compared."""
    monkeypatch.setattr(side_stream, "_device_with_streams", lambda reads: reads[0].device)
    return streams


def test_layers_that_are_compiled_one_by_one_wait_too(anywhere: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the wait is no part of what is compiled."""
    traced: list[bool] = []

    def current(device: torch.device) -> Stream:
        traced.append(torch.compiler.is_compiling())
        return anywhere.current(device)

    monkeypatch.setattr(torch.cuda, "current_stream", current)
    blocks = two_blocks()
    recall, hidden = recall_on("cpu")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = recall.prepared(blocks, prepare_together)
        made = recall.prepared(blocks, prepare_together, side_stream=True)
        for block in blocks:
            compiled = torch.compile(lambda hidden, block=block: made.through(block, hidden), backend="eager")
            torch.testing.assert_close(compiled(hidden), expected.through(block, hidden))
    torch._dynamo.reset()
    assert anywhere.current(hidden.device).waits == 1
    assert traced == [False, False, False]


def test_the_results_go_with_their_recall(anywhere: Streams) -> None:
    """Counted references alone free them: nothing waits for the garbage collector."""
    blocks = two_blocks()
    recall, hidden = recall_on("cpu")
    gc.disable()
    try:
        with torch.no_grad():
            made = recall.prepared(blocks, prepare_together, side_stream=True)
            made.through(blocks[0], hidden)
        key = weakref.ref(made.ready[0][1][0].key)
        assert key() is not None
        del made
        assert key() is None
    finally:
        gc.enable()


def test_the_handle_switches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_llava()
    handle = attach_vision_remember(model, [1, 3])
    randomise(handle)
    inputs = batch(model)
    asked: list[bool] = []
    prepared = Recall.prepared

    def spy(self: Recall, *args: Any, side_stream: bool = False) -> Recall:
        asked.append(side_stream)
        return prepared(self, *args, side_stream=side_stream)

    monkeypatch.setattr(Recall, "prepared", spy)
    with torch.no_grad():
        assert handle.side_stream is False
        expected = model(**inputs).logits
        handle.side_stream = True
        assert torch.equal(model(**inputs).logits, expected)
    assert asked == [False, True]
    assert "side_stream" not in handle.config.to_dict()
    with pytest.raises(ValueError, match="side_stream='yes': expected True or False"):
        handle.side_stream = "yes"  # type: ignore[assignment]
    assert handle.side_stream is True


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"absorb": True}, {"backend": "windowed"}], ids=str)
def test_on_a_gpu_it_changes_no_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Many times over, with levels of its own each time, whose memory and that of the results goes round."""
    blocks = [block.to("cuda", dtype) for block in two_blocks(**options)]
    lay_weights_side_by_side(blocks)
    recall, hidden = recall_on("cuda", sizes=3)
    hidden, wide = hidden.to(dtype), torch.randn(1024, 1024, device="cuda")

    def run(side: bool) -> Tensor:
        parts = tuple((_copied(memory, dtype), layout) for memory, layout in recall.parts)
        made = Recall(parts).prepared(blocks, prepare_together, side_stream=side)
        assert (made.side_work is not None) == side
        state = hidden
        for _ in range(4):  # layers of the decoder
            _ = wide @ wide
        for block in blocks:
            state = made.through(block, state)
        return state

    with torch.no_grad():
        expected = run(False)
        differ = torch.stack([(run(True) != expected).any() for _ in range(300)])
    assert not differ.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_captures_a_pass_without_it() -> None:
    blocks = [block.cuda() for block in two_blocks()]
    recall, hidden = recall_on("cuda")

    def run(side: bool) -> Tensor:
        made, state = recall.prepared(blocks, prepare_together, side_stream=side), hidden
        for block in blocks:
            state = made.through(block, state)
        return state

    with torch.no_grad():
        expected = run(True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(True)
        graph.replay()
    torch.testing.assert_close(captured, expected)


def _copied(memory: VisionMemory, dtype: torch.dtype) -> VisionMemory:
    levels = tuple(level.to(dtype, copy=True) for level in memory.levels)
    return VisionMemory(levels, memory.saliency, memory.feature_grid, memory.token_grid, memory.spans)
