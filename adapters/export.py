"""A block as a graph of its own, for runtimes without Python: torch.export or ONNX, checked against the block."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_remember.grid import Grid
from vision_remember.remember import VisionRemember

ExportFormat = Literal["torch", "onnx"]

_STD = 0.1
_TILES = (1, 3)
"""Tiles of the calls that compare; the export itself is made with two."""


@dataclass(frozen=True)
class Exported:
    """A written graph.

    Attributes:
        path: of the file.
        format: "torch" or "onnx".
        difference: largest absolute difference between graph and block, over calls with one tile and with three.
        magnitude: largest absolute update in these calls; zero for a block that is an identity.
        trial_difference: of a graph of the same block with random weights, made only where ``magnitude`` is zero, since
            there equal outputs would prove nothing; else None.
    """

    path: Path
    format: ExportFormat
    difference: float
    magnitude: float
    trial_difference: float | None


class OnGrids(nn.Module):
    """A block on fixed grids, of tensors alone: (T, h*w, D) tokens, (T, H*W, C) features, (T, H*W) saliency, any T."""

    def __init__(self, block: VisionRemember, token_grid: Grid, feature_grid: Grid) -> None:
        super().__init__()
        self.block, self.token_grid, self.feature_grid = block, token_grid, feature_grid

    def forward(self, tokens: Tensor, features: Tensor, saliency: Tensor) -> Tensor:
        """(T, h*w, D), residual included."""
        return self.block(
            tokens, features, token_grid=self.token_grid, feature_grid=self.feature_grid, saliency=saliency
        )


def export_block(
    block: VisionRemember,
    path: str | os.PathLike[str],
    *,
    token_grid: Grid,
    feature_grid: Grid,
    form: ExportFormat = "onnx",
) -> Exported:
    """Writes a block as a graph for any number of tiles, runs the graph, and says how far it is from the block.

    Inputs are ``tokens`` (T, h*w, D), ``features`` (T, H*W, C), the levels joined on channels, and ``saliency``
    (T, H*W); ones mean no saliency. The output is ``remembered`` (T, h*w, D), residual included. All are float32.

    Args:
        block: without a token mixer.
        path: of the file to write.
        token_grid: (h, w).
        feature_grid: (H, W).
        form: "torch" for ``torch.export`` (``.pt2``), "onnx" for ONNX, run by onnxruntime.

    Raises:
        ImportError: ONNX is asked for and not installed: ``pip install 'vision-remember[export]'``.
        ValueError: another form, a block with a token mixer, or one that gives NaN or infinity, which differ from
            nothing.
    """
    if form not in ("torch", "onnx"):
        raise ValueError(f"form={form!r}: expected 'torch' or 'onnx'")
    if block.token_mixer is not None:
        raise ValueError(f"token_mixer={block.token_mixer.kind!r}: only blocks without a token mixer are exported")
    if form == "onnx":
        _need_onnx()
    module = OnGrids(copy.deepcopy(block).float().cpu().eval(), token_grid, feature_grid)
    with torch.no_grad():
        if not module(*_inputs(module, 1)).isfinite().all():
            raise ValueError("the block gives NaN or infinity for ordinary inputs: look at its weights")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    difference, magnitude = _written(module, target, form)
    trial = None
    if magnitude == 0:
        aside = target.with_name(f".trial-{target.name}")
        try:
            trial, _ = _written(_randomised(module), aside, form)
        finally:
            for left in (aside, aside.with_name(aside.name + ".data")):
                left.unlink(missing_ok=True)
    return Exported(target, form, difference, magnitude, trial)


def _written(module: OnGrids, path: Path, form: ExportFormat) -> tuple[float, float]:
    """Writes the graph; (largest difference from the module, largest update)."""
    tiles = torch.export.Dim("tiles", min=1, max=4096)
    shapes = {name: {0: tiles} for name in ("tokens", "features", "saliency")}
    program = torch.export.export(module, _inputs(module, 2), dynamic_shapes=shapes)
    if form == "torch":
        torch.export.save(program, path)
        run = torch.export.load(path).module()
    else:
        torch.onnx.export(
            program,
            input_names=["tokens", "features", "saliency"],
            output_names=["remembered"],
            external_data=False,
            verbose=False,
        ).save(path)  # type: ignore[union-attr]
        run = _onnx_runner(path)
    difference = magnitude = 0.0
    with torch.no_grad():
        for count in _TILES:
            given = _inputs(module, count)
            expected = module(*given)
            apart = (run(*given) - expected).abs().nan_to_num(nan=math.inf)  # max() passes over NaN
            difference = max(difference, float(apart.max()))
            magnitude = max(magnitude, float((expected - given[0]).abs().max()))
    return difference, magnitude


def _onnx_runner(path: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*given: Tensor) -> Tensor:
        (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
        return torch.from_numpy(found)

    return run


def _inputs(module: OnGrids, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tiles)
    (h, w), (H, W) = module.token_grid, module.feature_grid
    interaction = module.block.interaction
    return (
        torch.randn(tiles, h * w, interaction.query_dim, generator=generator),
        torch.randn(tiles, H * W, interaction.feature_dim, generator=generator),
        torch.rand(tiles, H * W, generator=generator),
    )


def _randomised(module: OnGrids) -> OnGrids:
    module, generator = copy.deepcopy(module), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * _STD)
    return module


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX export needs {error.name}: pip install 'vision-remember[export]'") from error
