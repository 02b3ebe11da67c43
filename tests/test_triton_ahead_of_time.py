"""The Triton kernels compiled for GPUs that are not there: they compile, fit the registers, and spill none."""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from vision_remember.ops import triton_local_attention, triton_rows

pytest.importorskip("triton")

DTYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
ALWAYS_FLOAT32 = {"lse", "delta", "grad_logits", "grad_saliency"}
TENSORS = {
    "query",
    "key",
    "value",
    "saliency",
    "bias",
    "out",
    "hidden",
    "weight",
    "read",
    "update",
    "first",
    "second",
    "third",
    "fourth",
    *(f"grad_{x}" for x in ("out", "query", "key", "value")),
}
KERNELS = ("forward_kernel", "query_gradient_kernel", "cell_gradient_kernel")
OWNING = "query_gradient_kernel, owning cells"
MOST_REGISTERS = 255  # a GPU's own limit per thread


class Usage(NamedTuple):
    """What a kernel takes per thread, as ptxas reports it."""

    registers: int
    spilled_bytes: int


def options(kernel: str, dim: int, shared_bias: bool = False) -> dict[str, Any]:
    """What the operator compiles for, with saliency and bias and many queries."""
    query = torch.empty(1, 1, 1, dim)
    given = triton_local_attention._options(query, query, query, query)
    rows = triton_local_attention._rows(10_000, given)
    if kernel == "forward_kernel":
        return {**given, "SHARED_BIAS": shared_bias, "QUERIES": rows}
    given["WANTS_SALIENCY"] = True
    if kernel == "cell_gradient_kernel":
        return {**given, "CELLS": rows}
    given = triton_local_attention._with_cells(given, kernel.endswith("owning cells"))
    return {**given, "WANTS_BIAS": True, "QUERIES": rows}


def compiled(
    name: str,
    dtype: torch.dtype,
    capability: int,
    constants: dict[str, Any],
    directory: Path,
    launch: dict[str, Any] = triton_local_attention._COMPILE,
) -> Usage:
    """Compiles a kernel as a launch on such a GPU would, aligned tensors, strides and widths included."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    from vision_remember.ops import triton_kernels, triton_row_kernels

    kernel = getattr(triton_kernels if hasattr(triton_kernels, name) else triton_row_kernels, name)
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ALWAYS_FLOAT32:
            signature[argument] = "*fp32"
        elif argument == "mask":
            signature[argument] = "*i1"
        elif argument == "positions" or (name == "find_kernel" and argument == "out"):
            signature[argument] = "*i64"
        elif argument in TENSORS:
            signature[argument] = DTYPES[dtype]
        else:
            signature[argument] = "fp32" if argument in ("scale", "eps") else "i32"
        aligned = argument.endswith(("_batch", "_head", "_row", "_stride")) or argument in ("width", "inner")
        if signature[argument].startswith("*") or aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(key),): value for key, value in constants.items()},
        attrs=attributes,
    )
    target = GPUTarget("cuda", capability, 32)
    assembly = triton.compile(source, target=target, options=launch).asm
    assert assembly["cubin"]
    path = directory / "kernel.ptx"
    path.write_text(assembly["ptx"])
    architecture = re.search(r"^\.target (\w+)", assembly["ptx"], re.MULTILINE)
    assert architecture is not None
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture[1]}", str(path), "-o", "/dev/null"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill", report)
    assert (len(registers), len(spills)) == (1, 2), report  # one kernel; its stores and its loads
    return Usage(int(registers[0]), sum(map(int, spills)))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("kernel", "shared_bias"), [("forward_kernel", True), *product((*KERNELS, OWNING), (False,))])
def test_usual_heads(
    kernel: str, shared_bias: bool, dtype: torch.dtype, dim: int, capability: int, tmp_path: Path
) -> None:
    usage = compiled(kernel.split(",")[0], dtype, capability, options(kernel, dim, shared_bias), tmp_path)
    assert usage.registers <= MOST_REGISTERS
    assert usage.spilled_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "dim"), [*product(KERNELS, (16, 72, 256)), *product([OWNING], (16, 256))])
def test_other_sizes(kernel: str, dtype: torch.dtype, dim: int, capability: int, tmp_path: Path) -> None:
    usage = compiled(kernel.split(",")[0], dtype, capability, options(kernel, dim), tmp_path)
    assert usage.registers <= MOST_REGISTERS
    assert usage.spilled_bytes == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kernel", "width"),
    [
        ("find_kernel", None),
        ("write_kernel", None),
        ("add_kernel", None),
        *product(("normalise_kernel", "join_kernel"), (1024, 4096, 16384)),
    ],
)
def test_rows(kernel: str, width: int | None, dtype: torch.dtype, capability: int, tmp_path: Path) -> None:
    given: dict[str, Any]
    if width is not None:
        given = {**(triton_rows.norm_options if kernel == "normalise_kernel" else triton_rows.join_options)(width)}
    elif kernel == "write_kernel":
        given = {"HAS_BIAS": True, **triton_rows.write_options(dtype)}
    else:
        given = {**(triton_rows.ADD_OPTIONS if kernel == "add_kernel" else triton_rows.FIND_OPTIONS)}
    constants = {name: value for name, value in given.items() if name.isupper()}
    launch = {name: value for name, value in given.items() if not name.isupper()}
    usage = compiled(kernel, dtype, capability, constants, tmp_path, launch)
    assert usage.registers <= MOST_REGISTERS
    assert usage.spilled_bytes == 0
