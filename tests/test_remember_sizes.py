"""The block with images of several sizes in one call, and with levels one by one under activation checkpointing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vision_remember import FUSIONS, INTERACTIONS, VisionRemember
from vision_remember.grid import Grid

D, WIDTH, LEVELS = 16, 8, 3
SIZES: list[tuple[int, Grid, Grid]] = [(2, (4, 6), (8, 12)), (1, (4, 5), (7, 9)), (3, (1, 3), (2, 6))]

every_interaction = pytest.mark.parametrize("interaction", INTERACTIONS)


def block(**options: Any) -> VisionRemember:
    torch.manual_seed(0)
    return VisionRemember(D, WIDTH * LEVELS, num_levels=LEVELS, **{"zero_init": False, **options})


def images() -> dict[str, list[Any]]:
    """One entry per size."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "tokens": [random(batch, math.prod(grid), D) for batch, grid, _ in SIZES],
        "features": [[random(batch, math.prod(grid), WIDTH) for _ in range(LEVELS)] for batch, _, grid in SIZES],
        "token_grid": [grid for _, grid, _ in SIZES],
        "feature_grid": [grid for *_, grid in SIZES],
        "saliency": [random(batch, math.prod(grid)).sigmoid() for batch, _, grid in SIZES],
    }


def one_by_one(module: VisionRemember, given: dict[str, Any]) -> list[Tensor]:
    return [module(**{k: None if x is None else x[i] for k, x in given.items()}) for i in range(len(SIZES))]


@pytest.mark.parametrize("with_saliency", [True, False], ids=["saliency", "no saliency"])
@every_interaction
def test_sizes_together_are_sizes_one_by_one(interaction: str, with_saliency: bool) -> None:
    module, given = block(interaction=interaction), images()
    if not with_saliency:
        given["saliency"] = None
    outputs = module(**given)
    assert isinstance(outputs, list)
    for output, expected, tokens in zip(outputs, one_by_one(module, given), given["tokens"], strict=True):
        assert torch.equal(output, expected)
        assert not torch.equal(output, tokens)


def test_the_module_is_called_once_for_all_sizes() -> None:
    """So that hooks around it, such as those that gather sharded weights, run once."""
    module, calls = block(), []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    module(**images())
    assert len(calls) == 1


@pytest.mark.parametrize("mixed", [False, True], ids=["all levels", "prepared, joined and levels"])
@every_interaction
def test_every_size_may_come_as_it_likes(interaction: str, mixed: bool) -> None:
    module, given = block(interaction=interaction).double(), images()
    given = {k: [_double(entry) for entry in entries] for k, entries in given.items()}
    expected = module(**given)
    if mixed:
        prepared = module.prepare(given["features"][0], feature_grid=SIZES[0][2], saliency=given["saliency"][0])
        given["features"] = [prepared, torch.cat(given["features"][1], -1), given["features"][2]]
        given["saliency"] = [None, *given["saliency"][1:]]
    torch.testing.assert_close(module(**given), expected)


def _double(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_double(x) for x in entry]
    return entry.double() if isinstance(entry, Tensor) else entry


def test_no_sizes_are_no_error() -> None:
    assert block()(**{name: [] for name in images()}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_grid": [(4, 6), (4, 5)]}, "token_grid is 2 entries, but tokens is a list of 3"),
        ({"feature_grid": (8, 12)}, "feature_grid is 2 entries"),
        ({"saliency": torch.zeros(2, 96)}, r"saliency is a tensor \(2, 96\)"),
        ({"features": torch.zeros(2, 96, 24)}, r"features is a tensor \(2, 96, 24\)"),
    ],
)
def test_lists_that_do_not_match_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block()(**{**images(), **change})


def with_gradients(module: VisionRemember, given: dict[str, list[Any]]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given["tokens"]]
    levels = [[x.clone().requires_grad_() for x in size] for size in given["features"]]
    saliency = [x.clone().requires_grad_() for x in given["saliency"]]
    outputs = module(**{**given, "tokens": leaves, "features": levels, "saliency": saliency})
    module.zero_grad()
    torch.stack([output.sin().sum() for output in outputs]).sum().backward()
    inputs = [*leaves, *(x for size in levels for x in size), *saliency]
    return [*outputs, *(x.grad for x in inputs if x.grad is not None), *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("fusion", FUSIONS)
@every_interaction
def test_activation_checkpointing_changes_no_gradient(interaction: str, fusion: str, use_reentrant: bool) -> None:
    module, given = block(interaction=interaction, fusion=fusion, token_mixer="self"), images()
    expected = with_gradients(module, given)
    assert len(expected) == len(SIZES) * (3 + LEVELS) + len(list(module.parameters()))
    positional: list[int] = []

    def counted(function: Any, *args: Any) -> Tensor:
        positional.append(sum(isinstance(x, Tensor) for x in args))
        return checkpoint(function, *args, use_reentrant=use_reentrant)

    module.gradient_checkpointing = True
    module._gradient_checkpointing_func = counted
    torch.testing.assert_close(with_gradients(module, given), expected)
    assert positional == [2 + LEVELS] * len(SIZES), "tokens, saliency and each level"


def test_two_checkpointed_blocks_may_share_the_levels() -> None:
    """With re-entrant checkpointing too, since the levels are cut off the graph as every positional tensor is."""
    first, second = block(), block()
    for module in (first, second):
        module.gradient_checkpointing = True
        module._gradient_checkpointing_func = lambda f, *args: checkpoint(f, *args, use_reentrant=True)
    given = {k: x[0] for k, x in images().items()}
    source = given["tokens"].new_ones((), requires_grad=True)
    given["features"] = [level * source for level in given["features"]]
    given["tokens"] = first(**{**given, "tokens": given["tokens"].requires_grad_()})
    second(**given).sum().backward()
    assert source.grad is not None
    assert source.grad.isfinite()
