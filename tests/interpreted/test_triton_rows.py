"""The kernels around the attention, in the interpreter, against PyTorch's own operators in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F

from vision_remember.layout import VisionLayout
from vision_remember.ops import triton_rows
from vision_remember.ops.triton_rows import (
    add_update,
    can_find,
    can_join,
    find_places,
    gather_normalised,
    join_normalised,
    write_update,
)

# Of float32 sums of up to 100 products, and one rounding of half precision.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
DTYPES = [(a, b) for a in TOLERANCE for b in TOLERANCE]


@pytest.fixture(autouse=True)
def _poisoned() -> object:
    """New memory holds NaN, so that nothing passes for written that was not."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def positions_among(rows: int, count: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(rows))[:count].sort().values


def close(found: Tensor, exact: Tensor, *dtypes: torch.dtype) -> None:
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("stream", "own"), DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "count", "width"), [(7, 3, 5), (9, 9, 64), (40, 33, 100), (4, 1, 1), (6, 0, 8)])
def test_rows_are_gathered_and_normalised(
    rows: int, count: int, width: int, stream: torch.dtype, own: torch.dtype
) -> None:
    hidden, weight = torch.randn(rows, width).to(stream), torch.randn(width).to(own)
    places = positions_among(rows, count)
    found = gather_normalised(hidden, places, weight, 1e-6)
    assert found.dtype == own
    rows_of_places = hidden[places].to(own).double()
    close(found, F.rms_norm(rows_of_places, (width,), weight.double(), 1e-6), own)


@pytest.mark.parametrize("length", [0, 1, 30, 2048, 2049, 5000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spare", [-2, 0, 3], ids=["too many", "all", "too few"])
def test_places_are_found(length: int, share: float, spare: int) -> None:
    mask = torch.rand(length, generator=torch.Generator().manual_seed(length)) < share
    count = max(0, int(mask.sum()) + spare)
    found = find_places(mask, count)
    assert torch.equal(found, torch.nonzero_static(mask, size=count).squeeze(1))


def test_a_search_is_for_short_boolean_masks_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_find(torch.ones(8, dtype=torch.bool))
    monkeypatch.setattr(triton_rows, "kernels_run", lambda device: True)
    assert can_find(torch.ones(8192, dtype=torch.bool))
    assert not can_find(torch.ones(8193, dtype=torch.bool))
    assert not can_find(torch.ones(8, dtype=torch.int64))


def levels_of(count: int, images: int, cells: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """As a tap cuts them out behind a CLS token; no two levels have the same mean or spread."""
    return [
        (3 * level + (1 + level) * torch.randn(images, cells + 1, width)).to(dtype)[:, 1:] for level in range(count)
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("count", "images", "cells", "width"),
    [(1, 2, 3, 8), (3, 2, 5, 16), (4, 1, 2, 7), (5, 2, 3, 5), (9, 1, 1, 4), (3, 0, 4, 8), (2, 1, 3, 1)],
)
def test_levels_are_joined_and_each_normalised(
    count: int, images: int, cells: int, width: int, dtype: torch.dtype
) -> None:
    levels = levels_of(count, images, cells, width, dtype)
    assert can_join(levels)
    found = join_normalised(levels, 1e-5)
    assert found.dtype == dtype
    close(found, torch.cat([F.layer_norm(level.double(), (width,), eps=1e-5) for level in levels], dim=-1), dtype)


def test_a_level_far_from_zero_keeps_its_digits() -> None:
    levels = [1000 + torch.randn(1, 4, 64), torch.randn(1, 4, 64)]
    found = join_normalised(levels, 1e-5)
    exact = torch.cat([F.layer_norm(level.double(), (64,), eps=1e-5) for level in levels], dim=-1)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-4)


def test_levels_that_differ_are_not_for_the_kernel() -> None:
    one, other = levels_of(2, 2, 6, 8)
    assert can_join([one, other])
    assert not can_join([one, other[..., :4]])
    assert not can_join([one, other.contiguous()])
    assert not can_join([one, other.half()])
    assert not can_join([one.double(), other.double()])
    assert not can_join([one.transpose(1, 2), other.transpose(1, 2)])
    assert not can_join([one, other.clone().requires_grad_()])
    assert not torch.func.vmap(lambda level: torch.tensor(can_join([level, level])))(one[None]).any()
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_join([one, other])
    with FakeTensorMode():
        assert not can_join([torch.empty(1, 2, 8, device=f"cuda:{number}") for number in range(2)])
    with forward_ad.dual_level():
        assert not can_join([one, forward_ad.make_dual(other, other)])


@pytest.mark.parametrize(("stream", "own"), DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "count", "width"), [(70, 33, 5), (9, 9, 64), (40, 17, 600), (4, 1, 1), (3, 0, 8)])
def test_an_update_is_added_to_some_rows_and_the_rest_stays(
    rows: int, count: int, width: int, stream: torch.dtype, own: torch.dtype
) -> None:
    hidden, update = torch.randn(rows, width).to(stream), torch.randn(count, width).to(own)
    places = positions_among(rows, count)
    before = hidden.clone()
    found = add_update(hidden, places, update)
    assert torch.equal(hidden, before)
    assert torch.equal(found, hidden.index_copy(0, places, hidden[places] + update.to(stream)))


@pytest.mark.parametrize(("stream", "own"), DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "count", "width", "inner"),
    [(70, 33, 5, 7), (9, 9, 64, 64), (40, 17, 100, 70), (4, 1, 1, 1), (3, 0, 8, 8), (100, 40, 16, 16)],
)
def test_a_product_is_added_to_some_rows_and_the_rest_stays(
    rows: int, count: int, width: int, inner: int, bias: bool, stream: torch.dtype, own: torch.dtype
) -> None:
    hidden, read = torch.randn(rows, width).to(stream), torch.randn(count, inner).to(own)
    weight = (torch.randn(width, inner) / inner**0.5).to(own)
    offset = torch.randn(width).to(own) if bias else None
    places = positions_among(rows, count)
    before = hidden.clone()
    found = write_update(hidden, places, read, weight, offset)
    assert torch.equal(hidden, before)
    assert found.dtype == stream
    update = F.linear(read.double(), weight.double(), None if offset is None else offset.double())
    close(found, hidden.double().index_add(0, places, update), stream, own)
    others = torch.ones(rows, dtype=torch.bool).index_fill(0, places, False)
    assert torch.equal(found[others], hidden[others])


def test_they_take_a_view_of_a_wider_stream() -> None:
    wide = torch.randn(12, 40)
    hidden, places = wide[:, 8:24], positions_among(12, 5)
    layout = VisionLayout(places, None, 1, (1, 5))
    norm, linear = torch.nn.RMSNorm(16, eps=1e-6), torch.nn.Linear(16, 16)
    with torch.no_grad():
        tokens = gather_normalised(hidden, places, norm.weight, 1e-6)
        torch.testing.assert_close(tokens, norm(layout.gather(hidden[None]))[0])
        found = write_update(hidden, places, tokens, linear.weight, linear.bias)
        expected = layout.scatter(hidden[None], layout.gather(hidden[None]) + linear(tokens))
        torch.testing.assert_close(found, expected[0])
        torch.testing.assert_close(add_update(hidden, places, linear(tokens)), expected[0])


@pytest.mark.parametrize("missing", [0, 1, 3, 4])
def test_positions_that_name_no_row_write_none(missing: int) -> None:
    """Where there are fewer placeholders than tokens the list ends in -1; the host has its own error for that."""
    hidden, weight = torch.randn(6, 16), torch.eye(16)
    places = torch.tensor([1, 2, 4, 5])
    places[4 - missing :] = -1
    found = write_update(hidden, places, torch.ones(4, 16), weight, None)
    expected = hidden.clone()
    expected[places[: 4 - missing]] += 1
    assert torch.equal(found, expected)
    assert torch.equal(add_update(hidden, places, torch.ones(4, 16)), expected)
    assert gather_normalised(hidden, places, torch.ones(16), 1e-6)[4 - missing :].eq(0).all()


def test_pytorch_finds_no_fault_with_the_operators() -> None:
    hidden, places = torch.randn(6, 16), torch.tensor([1, 2, 5])
    namespace = torch.ops.vision_remember
    torch.library.opcheck(namespace.find_places, (torch.tensor([False, True, True]), 2))
    torch.library.opcheck(namespace.join_normalised, (levels_of(3, 2, 4, 8), 1e-5))
    torch.library.opcheck(namespace.add_update, (hidden, places, torch.randn(3, 16)))
    torch.library.opcheck(namespace.gather_normalised, (hidden, places, torch.ones(16), 1e-6))
    torch.library.opcheck(namespace.write_update, (hidden, places, torch.ones(3, 16), torch.randn(16, 16), None))
