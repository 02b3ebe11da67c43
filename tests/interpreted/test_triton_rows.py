"""The kernels around the attention, in the interpreter, against PyTorch's own operators in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vision_remember.layout import VisionLayout
from vision_remember.ops.triton_rows import gather_normalised, write_update

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


def test_both_take_a_view_of_a_wider_stream() -> None:
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
    assert gather_normalised(hidden, places, torch.ones(16), 1e-6)[4 - missing :].eq(0).all()


def test_pytorch_finds_no_fault_with_the_operators() -> None:
    hidden, places = torch.randn(6, 16), torch.tensor([1, 2, 5])
    namespace = torch.ops.vision_remember
    torch.library.opcheck(namespace.gather_normalised, (hidden, places, torch.ones(16), 1e-6))
    torch.library.opcheck(namespace.write_update, (hidden, places, torch.ones(3, 16), torch.randn(16, 16), None))
