"""Blocks whose gather, norm, attention and scatter are Triton kernels, in the interpreter, against plain ones."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from tests.hosts import batch, build_llava, randomise
from tests.launches import Launches
from vision_remember import VisionRemember, attach_vision_remember, remember
from vision_remember.grid import Grid
from vision_remember.memory import Recall, Span, VisionMemory
from vision_remember.ops import triton_kernels, triton_local_attention, triton_row_kernels
from vision_remember.remember import lay_weights_side_by_side, prepare_together

WIDTH, LEVEL = 32, 8
EVEN, UNEVEN = ((3, 4), (6, 8)), ((3, 4), (5, 7))
FUSED = ["gather_normalised", "local_attention", "write_update"]
FOR_MANY = ["gather_normalised", "local_attention", "add_update"]
PLAIN = ["local_attention"]


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each program, not for its size."""
    monkeypatch.setattr(triton_local_attention, "_TILE", 2**14)


def blocks_of(backend: str, **options: Any) -> list[VisionRemember]:
    torch.manual_seed(0)
    options = {"num_levels": 3, "zero_init": False, "attn_dim": 16, **options}
    return [VisionRemember(WIDTH, 3 * LEVEL, backend=backend, **options).eval() for _ in range(2)]


def problem(grids: tuple[Grid, Grid], *, saliency: bool = True) -> tuple[VisionMemory, Tensor, Tensor]:
    """The memory of three tiles, hidden states of two sequences, and where image tokens go: two tiles, then one."""
    generator = torch.Generator().manual_seed(1)
    tokens, cells = math.prod(grids[0]), math.prod(grids[1])
    levels = tuple(torch.randn(3, cells, LEVEL, generator=generator) for _ in range(3))
    spans = (Span(range(2 * tokens), range(2)), Span(range(2 * tokens, 3 * tokens), range(2, 3)))
    weight = torch.rand(3, cells, generator=generator) if saliency else None
    memory = VisionMemory(levels, weight, grids[1], grids[0], spans)
    hidden = torch.randn(2, 2 * tokens + 5, WIDTH, generator=generator)
    places = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    places[0, 2 : 2 + tokens] = places[0, 4 + tokens : 4 + 2 * tokens] = places[1, 1 : 1 + tokens] = True
    return memory, hidden, places


def through(blocks: list[VisionRemember], recall: Recall, hidden: Tensor) -> Tensor:
    recall = recall.prepared(blocks, prepare_together)
    for block in blocks:
        hidden = recall.through(block, hidden)
    return hidden


def ours(launches: Launches) -> list[str]:
    """The operators of ours but the one that joins levels, which all blocks share."""
    named = [name.split(".")[1] for name in launches.names if name.startswith("vision_remember")]
    return [name for name in named if name != "join_normalised"]


def in_double(blocks: list[VisionRemember], grids: tuple[Grid, Grid], **options: Any) -> Tensor:
    """What plain blocks of the same weights make of the problem in float64, each by the loop that defines it."""
    memory, hidden, places = problem(grids, **options)
    levels = tuple(level.double() for level in memory.levels)
    exact = VisionMemory(levels, memory.saliency, memory.feature_grid, memory.token_grid, memory.spans)
    plain = copy.deepcopy(blocks)
    for block in plain:
        block.double().interaction.backend = "naive"
    recall, hidden = exact.recall_images([0, 1], places), hidden.double()
    for block in plain:
        hidden = recall.through(block, hidden)
    return hidden


@pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("options", "saliency"),
    [
        ({}, True),
        ({}, False),
        ({"window": 2}, True),
        ({"fusion": "tokens"}, True),
        ({"fusion": "mix"}, True),
        ({"position": "none", "feature_norm": "joint"}, True),
    ],
)
@torch.no_grad()
def test_fused_blocks_are_the_loop_in_float64(
    options: dict[str, Any], saliency: bool, grids: tuple[Grid, Grid]
) -> None:
    blocks = blocks_of("triton", **options)
    memory, hidden, places = problem(grids, saliency=saliency)
    before = hidden.clone()
    with Launches() as launches:
        found = through(blocks, memory.recall_images([0, 1], places), hidden)
    assert ours(launches) == 2 * FUSED
    assert torch.equal(hidden, before)
    exact = in_double(blocks, grids, saliency=saliency)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-6)
    assert torch.equal(found[~places], hidden[~places])
    assert (found - hidden)[places].abs().amax(-1).gt(1e-2).all()


@torch.no_grad()
@pytest.mark.parametrize(("most", "expected"), [(36, FUSED), (35, FOR_MANY)])
def test_many_rows_are_left_to_the_libraries_product(
    most: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remember, "MOST_ROWS", most)
    blocks = blocks_of("triton")
    memory, hidden, places = problem(EVEN)
    with Launches() as launches:
        found = through(blocks, memory.recall_images([0, 1], places), hidden)
    assert ours(launches) == 2 * expected
    torch.testing.assert_close(found.double(), in_double(blocks, EVEN), rtol=0, atol=5e-6)
    assert torch.equal(found[~places], hidden[~places])


@torch.no_grad()
def test_levels_in_one_tensor_are_normalised_apart() -> None:
    block = blocks_of("triton")[0]
    memory, _, _ = problem(EVEN)
    grids: dict[str, Grid] = {"feature_grid": (6, 8), "token_grid": (3, 4)}
    (apart,) = prepare_together([block], memory.levels, **grids)
    (joined,) = prepare_together([block], [torch.cat(memory.levels, dim=-1)], **grids)
    torch.testing.assert_close(joined.key, apart.key, rtol=0, atol=2e-6)
    with pytest.raises(RuntimeError, match="unflatten"):
        prepare_together([block], memory.levels[:2], **grids)


@torch.no_grad()
def test_compiled_code_fits_every_number_of_images() -> None:
    block = blocks_of("triton")[0]

    def run(levels: list[Tensor], tokens: Tensor) -> Tensor:
        (prepared,) = prepare_together([block], levels, feature_grid=(6, 8), token_grid=(3, 4))
        return block(tokens, prepared, token_grid=(3, 4), feature_grid=(6, 8))

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for images in range(2, 6):
        levels, tokens = [torch.randn(images, 48, LEVEL) for _ in range(3)], torch.randn(images, 12, WIDTH)
        torch.testing.assert_close(compiled(levels, tokens), run(levels, tokens))
    assert counter.frame_count == 2, "once for the first, once for all others"


@torch.no_grad()
def test_levels_that_differ_in_width_are_joined_by_plain_operators() -> None:
    blocks = blocks_of("triton", level_dims=(4, 8, 12))
    memory, hidden, places = problem(EVEN)
    joined = torch.cat(memory.levels, dim=-1)
    memory = dataclasses.replace(memory, levels=joined.split((4, 8, 12), dim=-1))
    with Launches() as launches:
        found = through(blocks, memory.recall_images([0, 1], places), hidden)
    assert "vision_remember.join_normalised.default" not in launches.names
    with Launches() as launches:
        expected = through(blocks_of("windowed", level_dims=(4, 8, 12)), memory.recall_images([0, 1], places), hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_float32_blocks_in_a_half_precision_stream() -> None:
    blocks = blocks_of("triton")
    memory, hidden, places = problem(EVEN)
    with Launches() as launches:
        found = through(blocks, memory.recall_images([0, 1], places), hidden.half())
    assert ours(launches) == 2 * FUSED
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), in_double(blocks, EVEN), rtol=2e-3, atol=4e-3)


def test_each_operator_is_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    started: Counter[str] = Counter()

    class Counted:
        def __init__(self, module: Any, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: Any) -> Any:
            started[self.name] += 1
            return self.kernel[grid]

    kernels = ["join_kernel", "normalise_kernel", "forward_kernel", "write_kernel"]
    for name in kernels:
        module = triton_kernels if name == "forward_kernel" else triton_row_kernels
        monkeypatch.setattr(module, name, Counted(module, name))
    memory, hidden, places = problem(EVEN)
    with torch.no_grad():
        through(blocks_of("triton"), memory.recall_images([0, 1], places), hidden)
    assert started == {**dict.fromkeys(kernels, 2), "join_kernel": 1}


@pytest.mark.parametrize(("options", "shared"), [({}, True), ({"window": 2}, False)])
@torch.no_grad()
def test_a_bias_that_all_queries_share_is_read_once(
    options: dict[str, Any], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, given = triton_kernels.forward_kernel, []

    class Watched:
        def __getitem__(self, grid: Any) -> Any:
            def start(*args: Any, **constants: Any) -> None:
                given.append(constants["SHARED_BIAS"])
                kernel[grid](*args, **constants)

            return start

    monkeypatch.setattr(triton_kernels, "forward_kernel", Watched())
    memory, hidden, places = problem(((4, 4), (8, 8)) if options else EVEN)
    through(blocks_of("triton", **options), memory.recall_images([0, 1], places), hidden)
    assert given == [shared, shared]


def _hooked(block: VisionRemember) -> None:
    block.register_forward_hook(lambda *call: None)


def _with_a_stranger(block: VisionRemember) -> None:
    class Stranger(nn.Linear):
        """Such as an adapter puts in a layer's place."""

    plain = block.interaction.vr_out
    stranger = Stranger(plain.in_features, plain.out_features)
    stranger.load_state_dict(plain.state_dict())
    block.interaction.vr_out = stranger


def _with_a_watched_norm(block: VisionRemember) -> None:
    block.norm.register_forward_pre_hook(lambda *call: None)


@pytest.mark.parametrize("change", [_hooked, _with_a_stranger, _with_a_watched_norm])
@torch.no_grad()
def test_modules_are_called_where_somebody_listens(change: Any) -> None:
    memory, hidden, places = problem(EVEN)
    blocks = blocks_of("triton")
    recall = memory.recall_images([0, 1], places)
    fused = through(blocks, recall, hidden)
    for block in blocks:
        change(block)
    with Launches() as launches:
        found = through(blocks, recall, hidden)
    assert ours(launches) == 2 * PLAIN
    torch.testing.assert_close(found, fused, rtol=0, atol=2e-6)


@torch.no_grad()
def test_forward_derivatives_are_not_lost_on_the_way_around() -> None:
    """Of the stream alone, which the kernel of the attention never sees."""
    memory, hidden, places = problem(EVEN)
    block = blocks_of("triton")[0]
    recall = memory.recall_images([0, 1], places).prepared([block], prepare_together)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="backend='triton' cannot take forward-mode"):
        recall.through(block, forward_ad.make_dual(hidden, hidden))


@pytest.mark.parametrize("options", [{"output_layers": 2}, {"token_mixer": "self"}, {"inner_projections": True}])
@torch.no_grad()
def test_other_blocks_keep_their_modules_around_the_kernel(options: dict[str, Any]) -> None:
    memory, hidden, places = problem(EVEN)
    recall = memory.recall_images([0, 1], places)
    with Launches() as launches:
        found = through(blocks_of("triton", **options), recall, hidden)
    assert ours(launches) == 2 * PLAIN
    torch.testing.assert_close(found, through(blocks_of("windowed", **options), recall, hidden), rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_part_of_the_tokens_is_gathered_and_scattered_plainly() -> None:
    """As chunks of a prefill hold them."""
    memory, hidden, places = problem(EVEN)
    rows = torch.arange(places.sum()).roll(-24)
    with Launches() as launches:
        found = through(blocks_of("triton"), memory.recall_rows(rows, places), hidden)
    assert ours(launches) == 2 * PLAIN
    expected = through(blocks_of("windowed"), memory.recall_rows(rows, places), hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "options", [{}, {"window": 2}, {"fusion": "tokens"}, {"fusion": "mix"}, {"feature_norm": "joint"}], ids=str
)
def test_blocks_that_learn_have_the_gradients_of_plain_ones(options: dict[str, Any]) -> None:
    memory, hidden, places = problem(EVEN)
    found = []
    for backend in ("triton", "windowed"):
        blocks, stream = blocks_of(backend, **options), hidden.clone().requires_grad_()
        lay_weights_side_by_side(blocks)
        through(blocks, memory.recall_images([0, 1], places), stream).square().sum().backward()
        found.append([stream.grad, *(p.grad for block in blocks for p in block.parameters())])
    assert all(gradient is not None for gradient in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_blocks_that_learn_in_half_precision_take_saliency_as_it_is() -> None:
    """Float16 blocks and levels under a float32 map, as a model in half precision has them."""
    memory, hidden, places = problem(EVEN)
    found = []
    for backend, dtype in (("triton", torch.float16), ("windowed", torch.float32)):
        blocks = [block.to(dtype) for block in blocks_of(backend)]
        narrow = dataclasses.replace(memory, levels=tuple(level.to(dtype) for level in memory.levels))
        stream = hidden.to(dtype).requires_grad_()
        through(blocks, narrow.recall_images([0, 1], places), stream).float().square().sum().backward()
        found.append([stream.grad, *(p.grad for block in blocks for p in block.parameters())])
    for half, full in zip(*found, strict=True):
        assert half is not None
        assert full is not None
        assert half.dtype == torch.float16
        assert (half.float() - full).norm() < 5e-3 * full.norm()


def test_blocks_that_learn_share_what_has_no_weights() -> None:
    """Levels are joined and normalised once for both blocks, and each has two products over all levels."""
    blocks = blocks_of("triton")
    memory, hidden, places = problem(EVEN)
    with Launches() as launches:
        through(blocks, memory.recall_images([0, 1], places), hidden)
    assert launches.names.count("vision_remember.join_normalised.default") == 1
    assert not {"aten.cat.default", "aten.native_layer_norm.default"} & set(launches.names)
    cells = launches.names.count("aten.mm.default")
    assert cells == 2 * 2, launches.names
    assert launches.names.count("vision_remember.local_attention.default") == 2


@torch.no_grad()
def test_a_prepared_image_fits_its_own_grid_and_number_alone() -> None:
    memory, hidden, _ = problem(EVEN)
    blocks = blocks_of("triton")
    prepared = prepare_together(blocks, memory.levels, feature_grid=(6, 8), token_grid=(3, 4))[0]
    tokens = hidden[:, :12]
    with pytest.raises(ValueError, match=r"prepared for feature_grid=\(6, 8\), not for \(8, 6\)"):
        blocks[0](tokens, prepared, token_grid=(3, 4), feature_grid=(8, 6))
    with pytest.raises(ValueError, match="2 token grids, but 3 prepared images"):
        blocks[0](tokens, prepared, token_grid=(3, 4), feature_grid=(6, 8))


@torch.no_grad()
def test_an_attached_model_takes_them_where_its_blocks_ask_for_them() -> None:
    model = build_llava()
    handle = attach_vision_remember(model, [1, 3])
    randomise(handle)
    inputs = batch(model, (1, 2))
    expected = model(**inputs).logits
    for block in handle.module.values():
        block.interaction.backend = "triton"
    with Launches() as launches:
        found = model(**inputs).logits
    assert ours(launches) == 2 * FUSED
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    with handle.disabled():
        assert not torch.allclose(found, model(**inputs).logits, atol=0.01)


@torch.no_grad()
def test_fused_blocks_compile_into_one_graph() -> None:
    memory, hidden, places = problem(EVEN)
    blocks = blocks_of("triton")

    def run(hidden: Tensor, places: Tensor) -> Tensor:
        return through(blocks, memory.recall_images([0, 1], places), hidden)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, places), run(hidden, places))
