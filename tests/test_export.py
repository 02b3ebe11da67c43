"""torch.export: the block, the interactions and an attached decoder become graphs that give the same numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from tests.hosts import batch, build_llava, randomise
from vision_remember import INTERACTIONS, VisionRemember, attach_vision_remember, build_interaction
from vision_remember.adapters.attachment import NAME
from vision_remember.adapters.export import export_block

TOKENS, FEATURES = (3, 5), (6, 11)
D, C = 24, 16


def inputs(tiles: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (B, h*w, D), features (B, H*W, C) and saliency (B, H*W) of so many tiles."""
    generator = torch.Generator().manual_seed(tiles)
    (h, w), (H, W) = TOKENS, FEATURES
    tokens = torch.randn(tiles, h * w, D, generator=generator)
    return tokens, torch.randn(tiles, H * W, C, generator=generator), torch.rand(tiles, H * W, generator=generator)


class OnGrids(nn.Module):
    """A block or interaction on fixed grids: an export takes tensors only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: torch.Tensor, features: torch.Tensor, saliency: torch.Tensor) -> torch.Tensor:
        return self.module(tokens, features, token_grid=TOKENS, feature_grid=FEATURES, saliency=saliency)


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def exported(module: nn.Module, *, strict: bool) -> Any:
    tiles = Dim("tiles", min=1, max=64)
    shapes = {name: {0: tiles} for name in ("tokens", "features", "saliency")}
    return export(OnGrids(module), inputs(2), dynamic_shapes=shapes, strict=strict).module()


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_a_block_exports_for_any_number_of_tiles(interaction: str) -> None:
    block = randomised(VisionRemember(D, C, interaction=interaction))
    graph = exported(block, strict=False)
    for tiles in (1, 2, 5):
        given = inputs(tiles)
        actual = graph(*given)
        assert not torch.allclose(actual, given[0], atol=0.01)
        torch.testing.assert_close(actual, OnGrids(block)(*given))


@pytest.mark.parametrize("options", [{"window": 2}, {"position": "learned", "cells": (2, 3)}], ids=str)
def test_sela_exports_for_any_number_of_tiles(options: dict[str, Any]) -> None:
    interaction = randomised(build_interaction("sela", D, C, **options))
    graph = exported(interaction, strict=True)
    for tiles in (1, 3):
        torch.testing.assert_close(graph(*inputs(tiles)), OnGrids(interaction)(*inputs(tiles)))


def test_a_block_that_gives_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Between NaN and NaN there is no difference that could be too large."""
    block = VisionRemember(D, C)
    with torch.no_grad():
        block.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="gives NaN or infinity for ordinary inputs"):
        export_block(block, tmp_path / "graphs" / "block.pt2", token_grid=TOKENS, feature_grid=FEATURES, form="torch")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_gives_nan_is_infinitely_far_from_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(path: Path) -> Any:
        return SimpleNamespace(module=lambda: lambda *given: torch.full_like(given[0], torch.nan))

    monkeypatch.setattr(torch.export, "load", loaded)
    found = export_block(
        VisionRemember(D, C), tmp_path / "block.pt2", token_grid=TOKENS, feature_grid=FEATURES, form="torch"
    )
    assert (found.difference, found.trial_difference) == (torch.inf, torch.inf)


class Prefill(nn.Module):
    """A whole attached model, from token ids and pixels to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).logits


def test_an_attached_model_exports_with_its_blocks() -> None:
    model = build_llava()
    handle = attach_vision_remember(model, [1, 3])
    randomise(handle)
    given = batch(model, (1, 1))
    arguments = given["input_ids"], given["pixel_values"]
    with torch.no_grad():
        # First a call: in it, transformers installs hooks of its own, which cannot be exported.
        expected = Prefill(model)(*arguments)
        program = export(Prefill(model), arguments, strict=False)
        torch.testing.assert_close(program.module()(*arguments), expected)
        other = batch(model, (1, 1), seed=1)
        arguments = other["input_ids"], other["pixel_values"]
        torch.testing.assert_close(program.module()(*arguments), Prefill(model)(*arguments))
        with handle.disabled():
            assert not torch.allclose(Prefill(model)(*arguments), program.module()(*arguments), atol=0.01)
    names = [name for name in program.state_dict if NAME in name]
    assert len(names) == 2 * 8
