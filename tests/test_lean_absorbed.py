"""Absorbed projections are the same function: against the loop that defines it, values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vision_remember import VisionRememberConfig
from vision_remember.grid import Grid
from vision_remember.interactions import SELA, absorbed
from vision_remember.interactions.absorbed import absorbed_attention, pays_off
from vision_remember.interactions.region_cells import PreparedRegions, RegionCells

D, WIDTHS = 16, (8, 6, 10)
Grids = tuple[Grid, Grid]
EVEN: Grids = ((4, 6), (8, 18))
UNEVEN: Grids = ((4, 5), (7, 9))


def twins(**options: Any) -> tuple[SELA, SELA]:
    """An absorbing module and one that loops, with the same weights, in float64."""
    torch.manual_seed(0)
    options = {"level_dims": WIDTHS, "zero_init": False, "position": "learned", "num_heads": 4, **options}
    absorbing = SELA(D, 24, **{"absorb": True, **options}).double()
    looping = SELA(D, 24, **options, backend="naive").double()
    looping.load_state_dict(absorbing.state_dict())
    return absorbing, looping


def arguments_for(grids: Grids, *, saliency: bool = True, widths: tuple[int, ...] = WIDTHS) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    (token_grid, feature_grid), cells = grids, math.prod(grids[1])
    return {
        "tokens": draw(3, math.prod(token_grid), D),
        "features": [draw(3, cells, width) for width in widths],
        "saliency": draw(3, cells).sigmoid() if saliency else None,
        "token_grid": token_grid,
        "feature_grid": feature_grid,
    }


def gradients(module: SELA, arguments: dict[str, Any]) -> list[Tensor]:
    """The update, and gradients of tokens, levels, saliency and parameters."""
    tokens = arguments["tokens"].clone().requires_grad_()
    levels = [level.clone().requires_grad_() for level in arguments["features"]]
    saliency = None if arguments["saliency"] is None else arguments["saliency"].clone().requires_grad_()
    update = module(**{**arguments, "tokens": tokens, "features": levels, "saliency": saliency})
    module.zero_grad()
    update.sin().sum().backward()
    inputs = [tokens, *levels, *([] if saliency is None else [saliency])]
    return [update, *(x.grad for x in inputs), *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("saliency", [True, False], ids=["saliency", "no saliency"])
@pytest.mark.parametrize("position", ["learned", "none"])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_values_and_gradients_are_those_of_the_loop(grids: Grids, window: int, position: str, saliency: bool) -> None:
    absorbing, looping = twins(window=window, position=position)
    arguments = arguments_for(grids, saliency=saliency)
    for own, expected in zip(gradients(absorbing, arguments), gradients(looping, arguments), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(absorbing(**arguments), looping(**arguments), rtol=0, atol=1e-12)


@torch.no_grad()
def test_transforms_go_through_without_gradients() -> None:
    absorbing, looping = twins()
    given = arguments_for(EVEN)
    grids = {"token_grid": EVEN[0], "feature_grid": EVEN[1]}
    held = (given["tokens"], *given["features"], given["saliency"])
    found = []
    for module in (absorbing, looping):

        def read(tokens: Tensor, *rest: Tensor, module: SELA = module) -> Tensor:
            return module(tokens, rest[:-1], saliency=rest[-1], **grids)

        alone = torch.vmap(lambda *one, read=read: read(*(x[None] for x in one))[0])
        found.append([alone(*held), *torch.func.jvp(read, held, held)])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("feature_norm", ["per_level", "joint", "none"])
@pytest.mark.parametrize("fusion", ["concat", "mix", "mbtf"])
def test_levels_may_be_fused_and_normed_in_any_way(fusion: str, feature_norm: str) -> None:
    absorbing, looping = twins(fusion=fusion, feature_norm=feature_norm, level_dims=(8, 8, 8))
    arguments = arguments_for(EVEN, widths=(8, 8, 8))
    for own, expected in zip(gradients(absorbing, arguments), gradients(looping, arguments), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("buffer", [1, 5000, 1 << 20])
def test_the_size_of_a_group_of_heads_changes_nothing(buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absorbed, "_BUFFER_BYTES", buffer)
    absorbing, looping = twins(window=2)
    arguments = arguments_for(EVEN)
    with torch.no_grad():
        torch.testing.assert_close(absorbing(**arguments), looping(**arguments), rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(3, 2, 2, 4), (3, 5, 6), (3, 5, 3), (8, 9), (6, 9), (3, 5), (2, 2, 5)]
    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def attend(query: Tensor, first: Tensor, second: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        return absorbed_attention(query, [first, second], key, value, saliency=rest[0], bias=rest[1])

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_lower_precision_comes_close(dtype: torch.dtype, error: float) -> None:
    absorbing, looping = twins()
    arguments = arguments_for(EVEN)
    expected = looping(**arguments)
    lower = {
        name: [x.to(dtype) for x in value]
        if name == "features"
        else value.to(dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }
    for learning in (False, True):
        with torch.set_grad_enabled(learning):
            update = absorbing.to(dtype)(**lower)
        assert update.dtype == dtype
        torch.testing.assert_close(update.double(), expected, rtol=0, atol=error * expected.abs().max().item())


def test_autocast_comes_close() -> None:
    absorbing, looping = twins()
    arguments = arguments_for(EVEN)
    expected = looping(**arguments)
    single = {**arguments, "tokens": arguments["tokens"].float(), "saliency": arguments["saliency"].float()}
    single["features"] = [level.float() for level in arguments["features"]]
    for learning in (False, True):
        with torch.set_grad_enabled(learning), torch.autocast("cpu", torch.bfloat16):
            update = absorbing.float()(**single)
        torch.testing.assert_close(update.double(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def prepared(module: SELA, grids: Grids = EVEN) -> Any:
    arguments = arguments_for(grids)
    del arguments["tokens"]
    return module.prepare(**arguments)


def test_an_image_is_prepared_without_projecting_a_cell() -> None:
    absorbing, looping = twins()
    cells = prepared(absorbing)
    assert isinstance(cells, RegionCells)
    arguments = arguments_for(EVEN)
    expected = looping(**arguments)
    tokens = arguments["tokens"]
    update = absorbing(tokens, cells, token_grid=EVEN[0], feature_grid=EVEN[1])
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"prepared for token_grid=\(4, 6\), not for \(2, 6\)"):
        absorbing(tokens[:, :12], cells, token_grid=(2, 6), feature_grid=EVEN[1])
    with pytest.raises(ValueError, match="1 token grids, but 3 prepared images"):
        absorbing(tokens[:1], cells, token_grid=EVEN[0], feature_grid=EVEN[1])


def test_a_stranger_in_a_projections_place_is_called() -> None:
    """A LoRA layer, say: its weight does not tell what it does."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    absorbing, looping = twins()
    arguments = arguments_for(EVEN)
    with torch.no_grad():
        looping.vr_value.weight *= 2
        absorbing.vr_value = Doubled(absorbing.vr_value)
        torch.testing.assert_close(absorbing(**arguments), looping(**arguments), rtol=0, atol=1e-12)
    hooked, _ = twins()
    hooked.vr_key.register_forward_hook(lambda module, args, output: output)
    assert isinstance(prepared(hooked), PreparedRegions)


def test_auto_absorbs_where_it_pays_off() -> None:
    """One query for six cells, heads of 4 channels: not. Heads of 64: yes, while no gradient is asked for."""
    small, _ = twins(absorb="auto")
    large, _ = twins(absorb="auto", attn_dim=64, num_heads=1)
    with torch.no_grad():
        assert isinstance(prepared(small), RegionCells) == pays_off(1, 6, 4)
        assert isinstance(prepared(large), RegionCells)
    assert isinstance(prepared(large), PreparedRegions)


@pytest.mark.parametrize(
    ("queries", "cells", "head_dim", "expected"),
    [(1, 4, 64, True), (4, 16, 64, True), (1, 1, 64, False), (1, 4, 4, True), (1, 4, 2, False), (4, 4, 64, False)],
)
def test_it_pays_off_at_half_the_multiplications(queries: int, cells: int, head_dim: int, expected: bool) -> None:
    """Per head, region and channel of a cell: both projections of the cells, or both of the queries and two sums."""
    projecting = 2 * cells * head_dim
    absorbing = 2 * queries * head_dim + 2 * queries * cells
    assert (absorbing <= projecting / 2) == expected
    assert pays_off(queries, cells, head_dim) == expected


def test_options_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match="absorb='yes': expected True, False or 'auto'"):
        SELA(D, 24, absorb="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="absorb=True: fusion 'tokens' has a projection for each level"):
        SELA(D, 24, absorb=True, fusion="tokens", num_levels=3)
    with pytest.raises(ValueError, match="absorb='yes'"):
        VisionRememberConfig(absorb="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="absorb=True: interaction 'deformable' has no such option"):
        VisionRememberConfig(absorb=True, interaction="deformable").interaction_options(["num_points"])
