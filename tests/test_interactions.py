"""Every entry of the table of interactions: a new one is tested by being registered."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vision_remember import INTERACTIONS, build_interaction
from vision_remember.grid import Grid
from vision_remember.interactions import Interaction

D, C = 16, 24
EVEN: tuple[Grid, Grid] = ((4, 6), (8, 12))
UNEVEN: tuple[Grid, Grid] = ((4, 5), (7, 9))

# What these add to a token is the same whatever the token holds.
BLIND = {name for name, kind in INTERACTIONS.items() if not kind.reads_tokens}

every_interaction = pytest.mark.parametrize("name", INTERACTIONS)
every_pair_of_grids = pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=["even", "uneven"])


def build(name: str, **options: Any) -> Interaction[Any]:
    torch.manual_seed(0)
    return build_interaction(name, D, C, **{"zero_init": False, **options})


def image(token_grid: Grid, feature_grid: Grid, *, batch: int = 2) -> dict[str, Any]:
    """Arguments of a forward call, saliency included."""
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens": torch.randn(batch, math.prod(token_grid), D, generator=generator),
        "features": torch.randn(batch, math.prod(feature_grid), C, generator=generator),
        "token_grid": token_grid,
        "feature_grid": feature_grid,
        "saliency": torch.rand(batch, math.prod(feature_grid), generator=generator),
    }


def shaken(module: Interaction[Any]) -> Interaction[Any]:
    """With weights away from the start, where some are zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def idle(module: Interaction[Any]) -> set[str]:
    """Parameters without a gradient."""
    return {name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()}


@every_pair_of_grids
@every_interaction
def test_every_parameter_and_input_gets_a_gradient(name: str, grids: tuple[Grid, Grid]) -> None:
    module, arguments = shaken(build(name)), image(*grids)
    inputs = [arguments[key].requires_grad_() for key in ("tokens", "features", "saliency")]
    update = module(**arguments)
    assert update.shape == arguments["tokens"].shape
    update.square().sum().backward()
    assert not idle(module)
    assert [tensor.grad is not None and bool(tensor.grad.any()) for tensor in inputs] == [name not in BLIND, True, True]


@every_interaction
def test_zero_init_makes_a_zero_update_that_can_learn(name: str) -> None:
    """Of the first step only the last layer learns, of the second all do."""
    module, arguments = build(name, zero_init=True), image(*EVEN)
    target = torch.randn(arguments["tokens"].shape, generator=torch.Generator().manual_seed(2))
    update = module(**arguments)
    assert not update.any()
    (update - target).square().sum().backward()
    assert idle(module) != {name for name, _ in module.named_parameters()}
    torch.optim.SGD(module.parameters(), lr=0.01).step()
    module.zero_grad()
    (module(**arguments) - target).square().sum().backward()
    assert not idle(module)


@pytest.mark.parametrize("with_saliency", [True, False], ids=["saliency", "no saliency"])
@every_pair_of_grids
@every_interaction
def test_an_image_prepared_once_gives_the_same_updates(
    name: str, grids: tuple[Grid, Grid], with_saliency: bool
) -> None:
    module, arguments = build(name), image(*grids)
    if not with_saliency:
        arguments["saliency"] = None
    expected = module(**arguments)
    features, saliency = arguments.pop("features"), arguments.pop("saliency")
    prepared = module.prepare(features, feature_grid=grids[1], saliency=saliency)
    assert not isinstance(prepared, Tensor), "forward takes a tensor for features"
    for _ in range(2):
        torch.testing.assert_close(module(features=prepared, **arguments), expected)


@every_interaction
def test_saliency_of_one_is_no_saliency(name: str) -> None:
    module, arguments = build(name), image(*EVEN)
    assert not torch.allclose(module(**arguments), module(**{**arguments, "saliency": None}), atol=1e-3)
    arguments["saliency"] = torch.ones_like(arguments["saliency"])
    torch.testing.assert_close(module(**arguments), module(**{**arguments, "saliency": None}))


@every_pair_of_grids
@every_interaction
def test_images_of_a_batch_do_not_mix(name: str, grids: tuple[Grid, Grid]) -> None:
    module, arguments = build(name), image(*grids, batch=3)
    single = [
        module(**{key: x[i : i + 1] if isinstance(x, Tensor) else x for key, x in arguments.items()}) for i in range(3)
    ]
    torch.testing.assert_close(module(**arguments), torch.cat(single), rtol=1e-4, atol=1e-5)


@every_interaction
def test_updates_keep_the_dtype_of_the_weights(name: str) -> None:
    arguments = image(*UNEVEN)
    exact = build(name)(**arguments)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float64, 1e-5)):
        cast = {key: x.to(dtype) if isinstance(x, Tensor) else x for key, x in arguments.items()}
        update = build(name).to(dtype)(**cast)
        assert update.dtype == dtype
        torch.testing.assert_close(update.float(), exact, rtol=tolerance, atol=tolerance)


@every_interaction
def test_one_token_and_one_cell_are_grids_too(name: str) -> None:
    module = build(name)
    for grids in (((1, 1), (1, 1)), ((1, 5), (1, 11)), ((5, 1), (10, 1)), ((1, 1), (3, 4))):
        assert module(**image(*grids)).isfinite().all()


@every_interaction
def test_a_state_dict_brings_back_the_same_module(name: str) -> None:
    torch.manual_seed(3)
    module = build_interaction(name, D, C, zero_init=False)
    other = build(name)
    assert not torch.allclose(other(**image(*EVEN)), module(**image(*EVEN)))
    other.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
    assert torch.equal(other(**image(*EVEN)), module(**image(*EVEN)))


@every_pair_of_grids
@every_interaction
def test_compiles_without_graph_breaks(name: str, grids: tuple[Grid, Grid]) -> None:
    module, arguments = build(name), image(*grids)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments), module(**arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_grid": (4, 5)}, "tokens holds 24 positions, but token_grid=4x5 has 20"),
        ({"token_grid": (0, 24)}, r"token_grid=\(0, 24\)"),
        ({"feature_grid": (8, 11)}, "features holds 96 positions, but feature_grid=8x11 has 88"),
        ({"feature_grid": (96,)}, r"feature_grid=\(96,\)"),
        ({"tokens": torch.zeros(2, 24, D + 1)}, r"tokens \(2, 24, 17\).*query_dim=16"),
        ({"features": torch.zeros(2, 96, C - 1)}, r"features \(2, 96, 23\).*feature_dim=24"),
        ({"features": torch.zeros(3, 96, C)}, r"3 images|saliency"),
        ({"features": torch.zeros(3, 96, C), "saliency": None}, r"2 token grids.*3 images"),
        ({"saliency": torch.zeros(2, 95)}, r"saliency \(2, 95\).*\(2, 96\)"),
        ({"saliency": torch.zeros(2, 96, 1)}, r"saliency \(2, 96, 1\).*\(2, 96\)"),
    ],
)
@every_interaction
def test_arguments_that_do_not_fit_are_errors(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name)(**{**image(*EVEN), **change})


@every_interaction
def test_a_prepared_image_has_its_saliency_already(name: str) -> None:
    module, arguments = build(name), image(*EVEN)
    arguments["features"] = module.prepare(arguments["features"], feature_grid=EVEN[1])
    with pytest.raises(ValueError, match=r"prepare\(\)"):
        module(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"feature_grid": (8, 11)},
        {"saliency": torch.zeros(2, 1)},
        {"features": torch.zeros(2, 96, C - 1)},
        {"features": torch.zeros(96, C)},
    ],
    ids=["grid", "saliency", "width", "no images"],
)
@every_interaction
def test_what_is_prepared_is_checked(name: str, change: dict[str, Any]) -> None:
    features = {key: image(*EVEN)[key] for key in ("features", "feature_grid", "saliency")}
    with pytest.raises(ValueError, match=next(iter(change))):
        build(name).prepare(**{**features, **change})


@pytest.mark.parametrize("known", [True, False], ids=["token grid known", "token grid unknown"])
@every_interaction
def test_prepared_images_are_read_as_they_were_prepared(name: str, known: bool) -> None:
    """A single image would else be spread over all of a batch, and another grid of as many cells be taken for this."""
    module, (token_grid, feature_grid) = build(name), EVEN
    given = image(token_grid, feature_grid, batch=2)
    grids = {"feature_grid": feature_grid, **({"token_grid": token_grid} if known else {})}
    for batch in (1, 4):
        prepared = module.prepare(image(token_grid, feature_grid, batch=batch)["features"], **grids)
        with pytest.raises(ValueError, match=f"2 token grids, but {batch} prepared images"):
            module(given["tokens"], prepared, token_grid=token_grid, feature_grid=feature_grid)
    prepared = module.prepare(given["features"], **grids)
    with pytest.raises(ValueError, match=r"prepared for feature_grid=\(8, 12\), not for \(16, 6\)"):
        module(given["tokens"], prepared, token_grid=token_grid, feature_grid=(16, 6))


def test_an_unknown_interaction_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="unknown interaction 'sella': did you mean 'sela'"):
        build_interaction("sella", D, C)


@every_interaction
def test_an_unknown_option_is_an_error_with_a_suggestion(name: str) -> None:
    with pytest.raises(ValueError, match=f"interaction '{name}' has no option 'zero_int': did you mean 'zero_init'"):
        build_interaction(name, D, C, zero_int=True)
