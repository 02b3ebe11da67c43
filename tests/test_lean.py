"""What the blocks ask of a GPU, counted on a device that does not exist: launches, waits, bytes. No clock is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.launches import Launches, counted, fake, moved
from vision_remember import VisionRemember
from vision_remember.grid import Grid
from vision_remember.interactions import SELA
from vision_remember.memory import Span, VisionMemory
from vision_remember.ops.windowed import attend_regions
from vision_remember.remember import lay_weights_side_by_side, prepare_together, read_by_kernels

D, LEVEL = 896, 1024  # Qwen2-0.5B, CLIP-L


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def remembering(
    empty: Callable[..., Tensor], blocks: list[VisionRemember], token_grid: Grid, feature_grid: Grid, tiles: int = 1
) -> Callable[[], Tensor]:
    """A pass through blocks as a host makes it, from the encoder's levels to the states behind the last block."""
    count, cells = tiles * math.prod(token_grid), math.prod(feature_grid)
    levels = tuple(empty(tiles, cells, LEVEL) for _ in range(3))
    spans = (Span(range(count), range(tiles)),)
    memory = VisionMemory(levels, empty(tiles, cells, dtype=torch.float32), feature_grid, token_grid, spans)
    hidden, places = empty(1, count + 50, D), empty(1, count + 50, dtype=torch.bool)

    def run() -> Tensor:
        state = hidden
        kernels = read_by_kernels(blocks, hidden.device)
        recall = memory.recall_images([0], places, by_kernel=kernels).prepared(blocks, prepare_together)
        for block in blocks:
            state = recall.through(block, state)
        return state

    return run


def two_blocks(**options: Any) -> list[VisionRemember]:
    return [VisionRemember(D, 3 * LEVEL, num_levels=3, **options).eval() for _ in range(2)]


def without_weights(make: Callable[[], Any]) -> Any:
    """What ``make`` builds, without the time to draw its weights."""
    with torch.device("meta"):
        return make()


def count(token_grid: Grid = (12, 12), feature_grid: Grid = (24, 24), *, tiles: int = 1, **options: Any) -> Launches:
    blocks = without_weights(lambda: two_blocks(**options))
    with fake("cuda") as empty, torch.no_grad():
        for block in blocks:
            moved(block)
        lay_weights_side_by_side(blocks)
        run = remembering(empty, blocks, token_grid, feature_grid, tiles)
        with counted() as launches:
            assert run().is_cuda
    return launches


def test_two_blocks_take_21_launches_without_the_kernels() -> None:
    """All that one prefill adds between encoder and decoder, the search for the placeholders included."""
    launches = count(backend="windowed")
    assert len(launches.names) == 21, launches.names
    products = [name for name in launches.names if "mm" in name]
    assert len(products) == 5, "one for the keys and values of both blocks, then a query and an output each"
    # Copies ahead of two index_copy, and two masks made wider.
    assert launches.further == 4
    assert launches.copies == 0


@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_two_blocks_take_11_launches_with_the_kernels(backend: str, tiles: int) -> None:
    """The search for the placeholders included; each operator of ours is one kernel, as tests/interpreted show."""
    launches = count(tiles=tiles, backend=backend)
    assert len(launches.names) == (11 if tiles == 1 else 13), launches.names
    writing = ["write_update"] if tiles == 1 else ["addmm", "add_update"]  # large products are for the libraries
    assert [name.split(".")[1] for name in launches.names] == [
        *("find_places", "join_normalised", "mm"),
        *2 * ["gather_normalised", "addmm", "local_attention", *writing],
    ]
    assert (launches.further, launches.copies) == (0, 0)


@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize(("options", "most"), [({"position": "none"}, 21), ({"window": 2}, 25), ({"absorb": True}, 60)])
def test_launches_do_not_grow_with_the_image(options: dict[str, Any], most: int, tiles: int) -> None:
    names = count(tiles=tiles, backend="windowed", **options).names
    assert len(names) <= most, names
    assert count((24, 24), (48, 48), tiles=tiles, backend="windowed", **options).names == names


def test_the_counter_sees_what_it_is_for() -> None:
    """A mask used as an index is refused, a number asked for too, and work that is not shared counts again."""
    with FakeTensorMode(), counted():
        with pytest.raises(DynamicOutputShapeException):
            torch.ones(4, dtype=torch.bool).nonzero()
        with pytest.raises(DataDependentOutputException):
            torch.ones(3).sum().item()
    with fake("cuda") as empty, torch.no_grad():
        x = empty(4, 3)
        with counted() as launches:
            (x.t() + 1).flatten().sum()
        assert [name.split(".")[1] for name in launches.names] == ["add", "clone", "sum"]
        with counted() as copied:
            x.cpu()
        assert copied.copies == 1
        blocks = [moved(block) for block in without_weights(two_blocks)]
        run = remembering(empty, blocks, (12, 12), (24, 24))  # type: ignore[arg-type]
        with counted() as apart:
            run()
        assert len(apart.names) > 12


@pytest.mark.parametrize("mode", ["prefill", "training"])
@pytest.mark.parametrize("options", [{}, {"window": 2}, {"fusion": "tokens"}, {"absorb": True}])
def test_bytes_grow_exactly_with_the_cells(options: dict[str, Any], mode: str) -> None:
    """From 12x12 tokens over 24x24 cells to twice and three times the side: 4 and 9 times the bytes."""

    def peak(side: int) -> int:
        module = without_weights(lambda: SELA(D, 3 * LEVEL, num_levels=3, **options))
        device = "cpu" if mode == "training" else "cuda"
        with fake(device) as empty, torch.set_grad_enabled(mode == "training"):
            moved(module, device)
            tokens = empty(1, side**2, D)
            levels = [empty(1, (2 * side) ** 2, LEVEL) for _ in range(3)]
            with counted() as launches:
                update = module(tokens, levels, token_grid=(side, side), feature_grid=(2 * side, 2 * side))
                assert update.shape == tokens.shape
        return launches.peak

    base = peak(12)
    # What does not grow, the position table of each level put together, is a thousandth of the rest.
    assert peak(24) == pytest.approx(4 * base, rel=2e-3)
    assert peak(36) == pytest.approx(9 * base, rel=2e-3)


def test_the_core_holds_its_result_and_nothing_else() -> None:
    """At 72x72 cells in the order of regions; dense attention, of the same tokens, holds its scores besides."""

    def peak(queries: int, cells: int, attend: Callable[..., Tensor]) -> int:
        with fake("cuda") as empty, torch.no_grad():
            regions = 36 * 36 // queries
            query = empty(regions, queries, 14, 64).transpose(1, 2)
            key, value = (empty(regions, cells, 14, 64).transpose(1, 2) for _ in range(2))
            with counted() as launches:
                attend(query, key, value)
        return launches.peak

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(query, key.transpose(-1, -2)).softmax(-1), value)

    lean = peak(1, 4, attend_regions)
    assert lean == 36 * 36 * 14 * 64 * 2
    assert peak(36 * 36, 72 * 72, dense) >= 100 * lean


@pytest.mark.parametrize("interaction", ["sela", "deformable"])
def test_no_tensor_relates_every_token_to_every_cell(interaction: str) -> None:
    token_grid, feature_grid = (10, 11), (20, 22)
    many = {110, 440}
    block = VisionRemember(D, 3 * LEVEL, num_levels=3, interaction=interaction).eval()
    arguments = {"token_grid": token_grid, "feature_grid": feature_grid, "saliency": torch.rand(1, 440)}
    with torch.no_grad(), Launches() as launches:
        block(torch.randn(1, 110, D), [torch.randn(1, 440, LEVEL) for _ in range(3)], **arguments)
    assert not [shape for shape in launches.shapes if len([side for side in shape if side in many]) > 1]


def test_global_attention_does_relate_them() -> None:
    """So that the test above could fail: the same scan over dense attention, taken apart."""
    query, key = torch.randn(1, 14, 110, 64), torch.randn(1, 14, 440, 64)
    with Launches() as launches:
        (query @ key.transpose(-1, -2)).softmax(-1)
    assert (1, 14, 110, 440) in launches.shapes


@pytest.mark.parametrize(
    ("options", "learning"),
    [({}, False), ({}, True), ({"window": 2, "absorb": True}, False), ({"interaction": "deformable"}, True)],
)
def test_blocks_are_one_graph(options: dict[str, Any], learning: bool) -> None:
    torch.manual_seed(0)
    blocks = [VisionRemember(16, 24, num_levels=3, zero_init=False, **options) for _ in range(2)]
    levels = tuple(torch.randn(2, 48, 8) for _ in range(3))
    token_grid = (4, 2) if options.get("window") == 2 else (4, 4)  # blocks of tokens, and regions that overlap
    per_image = math.prod(token_grid)
    spans = (Span(range(per_image), range(1)), Span(range(per_image, 2 * per_image), range(1, 2)))
    memory = VisionMemory(levels, torch.rand(2, 48), (8, 6), token_grid, spans)
    hidden, places = torch.randn(2, per_image + 3, 16), torch.zeros(2, per_image + 3, dtype=torch.bool)
    places[:, 2 : 2 + per_image] = True

    def run(hidden: Tensor, places: Tensor) -> Tensor:
        recall = memory.recall_images([0, 1], places).prepared(blocks, prepare_together)
        for block in blocks:
            hidden = recall.through(block, hidden)
        return hidden

    with torch.set_grad_enabled(learning):
        expected = run(hidden, places)
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(hidden, places), expected)
    assert not torch.equal(expected, hidden)


@pytest.mark.slow
def test_compiled_blocks_take_16_kernels() -> None:
    """Eight products and eight fused kernels, as Inductor writes them for a CPU; the search for placeholders apart."""
    blocks = two_blocks(zero_init=False)
    generator = torch.Generator().manual_seed(0)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype == torch.bool:
            return (torch.arange(shape[-1]) >= 50).expand(shape)
        return torch.rand(*shape, generator=generator)

    run = remembering(empty, blocks, (12, 12), (24, 24))
    with torch.no_grad():
        try:
            made, (code,) = run_and_get_code(torch.compile(run, fullgraph=True))
        except Exception as error:
            pytest.skip(f"torch {torch.__version__} compiles nothing here: {type(error).__name__}")
        torch.testing.assert_close(made, run())
    calls = re.findall(r"(extern_kernels\.\w+|cpp_fused\w*)\(", code[code.index("def call") :])
    assert len(calls) <= 16, calls


@pytest.mark.parametrize("interaction", ["sela", "global", "deformable", "deepstack"])
def test_no_tensor_is_made_of_numbers_that_a_gpu_would_have_to_be_sent(interaction: str) -> None:
    made: list[str] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(str(func))
            return func(*args, **(kwargs or {}))

    run = remembering(
        lambda *shape, dtype=torch.float32: torch.ones(*shape, dtype=dtype),
        [VisionRemember(D, 3 * LEVEL, num_levels=3, interaction=interaction).eval() for _ in range(2)],
        (2, 3),
        (4, 6),
        tiles=57,  # all positions, since all are placeholders here
    )
    with Made():
        torch.ones(1).new_tensor([1.0, 2.0])
        assert "aten.lift_fresh.default" in made, "what the operator is called"
        made.clear()
        with torch.no_grad():
            run()
    assert "aten.mm.default" in made or "aten.addmm.default" in made
    assert "aten.lift_fresh.default" not in made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("interaction", ["sela", "global", "deformable", "deepstack"])
def test_nothing_waits_for_the_gpu(interaction: str) -> None:
    blocks = [block.cuda() for block in two_blocks(zero_init=False, interaction=interaction)]
    lay_weights_side_by_side(blocks)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype == torch.bool:
            return (torch.arange(shape[-1], device="cuda") >= 50).expand(shape)
        return torch.rand(*shape, device="cuda")

    run = remembering(empty, blocks, (12, 12), (24, 24))
    with torch.no_grad():
        expected = run()  # libraries set themselves up in the first call
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


class _Alike(nn.Module):
    """A stranger in a block's place."""

    def __init__(self, block: VisionRemember) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


@pytest.mark.parametrize("learning", [False, True], ids=["prefill", "training"])
@pytest.mark.parametrize("options", [{}, {"fusion": "tokens"}, {"fusion": "mix"}, {"interaction": "global"}])
def test_what_is_prepared_ahead_is_bit_for_bit_what_blocks_prepare(options: dict[str, Any], learning: bool) -> None:
    torch.manual_seed(0)
    blocks = [VisionRemember(16, 24, num_levels=3, zero_init=False, **options) for _ in range(2)]
    levels = tuple(torch.randn(3, 48, 8) for _ in range(3))
    memory = VisionMemory(levels, torch.rand(3, 48), (6, 8), (3, 4), (Span(range(36), range(3)),))
    hidden, places = torch.randn(2, 20, 16), torch.zeros(2, 20, dtype=torch.bool)
    places[:, 1:19] = True
    with torch.set_grad_enabled(learning):
        recall = memory.recall_images([0], places)
        ahead = recall.prepared(blocks, prepare_together)
        strangers = [_Alike(block) for block in blocks]
        assert all(made == (None,) for _, made in recall.prepared(strangers, prepare_together).ready)
        for block in blocks:
            assert torch.equal(ahead.through(block, hidden), recall.through(block, hidden))
    prepared = [made for _, (made,) in ahead.ready]
    assert all(made is None for made in prepared) == (options.get("interaction") == "global")
    if learning and prepared[0] is not None:
        assert prepared[0] is prepared[1], "the cells in their order are made once"


@pytest.mark.parametrize("learning", [True, False], ids=["learning", "no gradients"])
@pytest.mark.parametrize(
    "elsewhere",
    [lambda weight: weight.new_empty(0), lambda weight: weight.flatten(), lambda weight: weight.to("meta")],
    ids=["empty, as DeepSpeed's shards", "flat, as FSDP's", "offloaded"],
)
def test_nothing_is_prepared_ahead_with_weights_that_are_elsewhere(
    elsewhere: Callable[[Tensor], Tensor], learning: bool
) -> None:
    here, away = VisionRemember(16, 24, num_levels=3), VisionRemember(16, 24, num_levels=3)
    for name, parameter in list(away.interaction.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(away.interaction.get_submodule(owner), leaf, nn.Parameter(elsewhere(parameter.detach())))
    levels = [torch.randn(2, 16, 8) for _ in range(3)]
    with torch.set_grad_enabled(learning):
        mine, theirs = prepare_together([here, away], levels, feature_grid=(4, 4), token_grid=(2, 2))
    assert mine is not None
    assert theirs is None


def test_nothing_is_prepared_ahead_without_parameters() -> None:
    """As FSDP's first version leaves a block by default: its weights are tensors, views of a parameter elsewhere."""
    block = VisionRemember(16, 24, num_levels=3)
    arguments = {"token_grid": (2, 2), "feature_grid": (4, 4)}
    levels = [torch.randn(2, 16, 8) for _ in range(3)]
    tokens = torch.randn(2, 4, 16)
    with torch.no_grad():
        expected = block(tokens, levels, **arguments)
        for module in block.modules():
            for name in list(module._parameters):
                weight = module._parameters.pop(name)
                setattr(module, name, None if weight is None else weight.detach())
        assert prepare_together([block], levels, **arguments) == [None]
        assert torch.equal(block(tokens, levels, **arguments), expected)


def test_banked_weights_are_saved_as_tensors_of_their_own() -> None:
    """Safetensors, and all that writes by it, takes tensors of one storage for one and the same."""
    blocks = [VisionRemember(16, 24, num_levels=3) for _ in range(2)]
    lay_weights_side_by_side(blocks)
    module = nn.ModuleList(blocks)
    keys = [module.get_parameter(f"{index}.interaction.vr_key.weight") for index in range(2)]
    assert keys[0].untyped_storage().data_ptr() == keys[1].untyped_storage().data_ptr()
    state = module.state_dict()
    storages = [tensor.untyped_storage() for tensor in state.values()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert all(storage.nbytes() == tensor.nbytes for storage, tensor in zip(storages, state.values(), strict=True))
    assert all(torch.equal(tensor, module.get_parameter(name)) for name, tensor in state.items())
    module.load_state_dict({name: tensor + 1 for name, tensor in state.items()})
    assert torch.equal(keys[0], state["0.interaction.vr_key.weight"] + 1)
    assert module.state_dict(keep_vars=True)["0.interaction.vr_key.weight"] is keys[0]
