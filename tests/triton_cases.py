"""What the Triton kernels are tried on, in the interpreter and on a GPU, and the comparison with the oracle."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.reference import bias_shapes
from vision_remember import local_attention
from vision_remember.grid import Grid
from vision_remember.ops import naive_local_attention

BATCH, HEADS = 2, 2
# Largest error of the output and of the gradients, as a part of the largest entry. Half precision rounds each result to
# its few digits, and also the output that the backward pass starts from.
TOLERANCE = {torch.float32: (1e-6, 5e-5), torch.float16: (1e-3, 4e-3), torch.bfloat16: (2e-2, 4e-2)}


class Case(NamedTuple):
    """One problem; ``bias`` is the number of its dimensions."""

    query_grid: Grid
    key_grid: Grid
    window: int = 1
    levels: int = 1
    dim: int = 8
    value_dim: int = 8
    saliency: bool = True
    bias: int | None = 4

    @property
    def grids(self) -> dict[str, Any]:
        return {
            "query_grid": self.query_grid,
            "key_grid": self.key_grid,
            "window": self.window,
            "key_levels": self.levels,
        }

    def __str__(self) -> str:
        (h, w), (H, W) = self.query_grid, self.key_grid
        extras = [f"window {self.window}", f"levels {self.levels}", f"dims {self.dim} {self.value_dim}"]
        extras += ["saliency"] * self.saliency + [f"bias {self.bias}"] * (self.bias is not None)
        return ", ".join([f"{H}x{W} to {h}x{w}", *extras])


CASES = [
    Case((12, 12), (24, 24), saliency=False, bias=3),  # what SELA asks for
    Case((3, 4), (6, 12), levels=2),  # every cell belongs to one query
    Case((12, 12), (24, 24), window=2, bias=3),
    Case((14, 14), (27, 27)),
    Case((14, 14), (27, 27), window=2, saliency=False, bias=None),
    Case((7, 7), (15, 15), window=3, bias=None),
    Case((8, 12), (16, 36), window=3),  # blocks divide one axis alone
    Case((5, 4), (7, 9), levels=3),
    Case((4, 6), (8, 12), window=2, levels=3, bias=3),
    Case((1, 6), (1, 13), window=4),  # one row
    Case((6, 1), (12, 1), saliency=False),  # one column
    Case((1, 1), (3, 4)),  # one token
    Case((1, 1), (1, 1), bias=3),  # one cell
    Case((5, 7), (3, 4), window=2),  # more tokens than cells
    Case((3, 4), (5, 4), window=12, bias=None),  # one block for all
    Case((2, 3), (4, 7), dim=72, value_dim=5),  # no powers of two
    Case((2, 3), (4, 6), dim=72),
    Case((2, 2), (3, 3), dim=256, value_dim=300, bias=None),  # a value in two parts
]


def tensors(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Random arguments that want gradients."""
    generator = torch.Generator().manual_seed(0)
    tokens, cells = math.prod(case.query_grid), case.levels * math.prod(case.key_grid)
    shapes: dict[str, tuple[int, ...]] = {
        "query": (BATCH, HEADS, tokens, case.dim),
        "key": (BATCH, HEADS, cells, case.dim),
        "value": (BATCH, HEADS, cells, case.value_dim),
    }
    if case.saliency:
        shapes["saliency"] = (BATCH, cells)
    if case.bias is not None:
        *rest, places = bias_shapes(HEADS, case.query_grid, case.key_grid, case.window)[case.bias]
        shapes["bias"] = (*rest, case.levels * places)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in made.items()}


def with_gradients(function: Any, inputs: dict[str, Tensor], **rest: Any) -> list[Tensor]:
    """The output of a function, and the gradient of each input for one fixed cotangent."""
    output = function(**inputs, **rest)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad(output, list(inputs.values()), cotangent.to(output))]


def check_against_oracle(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Raises AssertionError unless the kernels' output and every gradient are those of the loop in float64."""
    inputs = tensors(case, dtype, device)
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in inputs.items()}
    expected = with_gradients(naive_local_attention, exact, **case.grids)
    results = with_gradients(local_attention, inputs, **case.grids, backend="triton")
    of_output, of_gradients = TOLERANCE[dtype]
    for name, result, reference in zip(["output", *inputs], results, expected, strict=True):
        assert result.dtype == dtype
        largest = max(reference.abs().max().item(), 1.0)
        tolerance = largest * (of_output if name == "output" else of_gradients)
        torch.testing.assert_close(
            result.detach().cpu().double(), reference, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
