"""The block: identity at birth, residual, dtypes, checkpointing, compilation; with every interaction."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vision_remember import INTERACTIONS, VisionRemember, VisionRememberConfig
from vision_remember.grid import Grid
from vision_remember.interactions import interaction_options

D, C = 16, 24
EVEN: tuple[Grid, Grid] = ((4, 6), (8, 12))
UNEVEN: tuple[Grid, Grid] = ((4, 5), (7, 9))

every_interaction = pytest.mark.parametrize("interaction", INTERACTIONS)
every_pair_of_grids = pytest.mark.parametrize("grids", [EVEN, UNEVEN], ids=["even", "uneven"])


def block(**options: Any) -> VisionRemember:
    torch.manual_seed(0)
    return VisionRemember(D, C, **options)


def image(
    token_grid: Grid = EVEN[0], feature_grid: Grid = EVEN[1], *, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments of a forward call. A few channels are huge, as they are in the residual stream of a decoder."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, math.prod(token_grid), D, generator=generator)
    tokens[..., :2] *= 1000
    return {
        "tokens": tokens.to(dtype),
        "features": torch.randn(2, math.prod(feature_grid), C, generator=generator).to(dtype),
        "token_grid": token_grid,
        "feature_grid": feature_grid,
        "saliency": torch.rand(2, math.prod(feature_grid), generator=generator),
    }


@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32 block", "block like tokens"])
@every_pair_of_grids
@every_interaction
def test_the_default_is_an_exact_identity(
    interaction: str, grids: tuple[Grid, Grid], weights: torch.dtype | None, tokens: torch.dtype
) -> None:
    config = VisionRememberConfig.from_preset("default", interaction=interaction)
    module = VisionRemember.from_config(config, D, C).to(weights or tokens)
    arguments = image(*grids, dtype=tokens)
    output = module(**arguments)
    assert output.dtype == tokens
    assert torch.equal(output, arguments["tokens"])


@pytest.mark.parametrize("interaction", [name for name, kind in INTERACTIONS.items() if kind.reads_tokens])
def test_the_paper_preset_is_no_identity(interaction: str) -> None:
    torch.manual_seed(0)
    lacking = {"attn_dim", "query_layers", "output_layers"} - set(interaction_options(interaction))
    default = {field: getattr(VisionRememberConfig(), field) for field in lacking}
    config = VisionRememberConfig.from_preset("paper", interaction=interaction, **default)
    module = VisionRemember.from_config(config, D, C)
    arguments = image()
    changed = (module(**arguments) != arguments["tokens"]).any(-1)
    assert changed.all()


@every_pair_of_grids
@every_interaction
def test_it_adds_what_the_interaction_makes_of_normalised_tokens(interaction: str, grids: tuple[Grid, Grid]) -> None:
    module, arguments = block(interaction=interaction, zero_init=False), image(*grids)
    tokens = arguments.pop("tokens") * 1e-5  # so small that the norm's epsilon shows
    normalised = tokens
    if module.interaction.reads_tokens:
        with torch.no_grad():
            module.norm.weight.uniform_(0.5, 1.5)
        normalised = tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm.weight
    update = module.interaction(normalised, **arguments)
    torch.testing.assert_close(module(tokens, **arguments), tokens + update)


@every_interaction
def test_the_scale_of_the_residual_stream_does_not_reach_the_update(interaction: str) -> None:
    module, arguments = block(interaction=interaction, zero_init=False).double(), image(dtype=torch.float64)
    tokens = arguments.pop("tokens")
    update, scaled = (module(x, **arguments) - x for x in (tokens, 1000 * tokens))
    assert update.abs().max() > 0.1
    torch.testing.assert_close(scaled, update, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_interaction
def test_a_float32_block_works_in_float32_and_keeps_the_dtype_of_tokens(interaction: str, dtype: torch.dtype) -> None:
    module, arguments = block(interaction=interaction, zero_init=False), image(dtype=dtype)
    output = module(**arguments)
    assert output.dtype == dtype
    float32 = {k: x.float() if isinstance(x, Tensor) else x for k, x in arguments.items()}
    update = module(**float32) - float32["tokens"]
    torch.testing.assert_close(output, arguments["tokens"] + update.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)


@every_interaction
def test_autocast_keeps_the_dtype_and_comes_close(interaction: str) -> None:
    module, arguments = block(interaction=interaction, zero_init=False), image()
    exact = module(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(**arguments)
    assert output.dtype == torch.float32
    assert not torch.equal(output, exact)
    torch.testing.assert_close(output, exact, rtol=0, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(interaction=interaction)(**arguments), arguments["tokens"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_pair_of_grids
@every_interaction
def test_an_image_prepared_once_gives_the_same_tokens(
    interaction: str, grids: tuple[Grid, Grid], dtype: torch.dtype
) -> None:
    module, arguments = block(interaction=interaction, zero_init=False), image(*grids, dtype=dtype)
    expected = module(**arguments)
    features, saliency = arguments.pop("features"), arguments.pop("saliency")
    prepared = module.prepare(features, feature_grid=grids[1], saliency=saliency)
    torch.testing.assert_close(module(features=prepared, **arguments), expected)


def run(module: VisionRemember, arguments: dict[str, Any], *, prepared: bool = False) -> list[Tensor]:
    """Output and gradients of inputs and parameters."""
    inputs = {k: x.clone().requires_grad_() for k, x in arguments.items() if isinstance(x, Tensor)}
    given: dict[str, Any] = {**arguments, **inputs}
    if prepared:
        grid, saliency = given["feature_grid"], given.pop("saliency")
        given["features"] = module.prepare(given["features"], feature_grid=grid, saliency=saliency)
    output = module(**given)
    module.zero_grad()
    output.sin().sum().backward()
    return [output, *(x.grad for x in inputs.values()), *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("prepared", [False, True], ids=["features", "prepared"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@every_interaction
def test_activation_checkpointing_changes_no_gradient(interaction: str, use_reentrant: bool, prepared: bool) -> None:
    module, arguments = block(interaction=interaction, zero_init=False), image(*UNEVEN)
    expected = run(module, arguments, prepared=prepared)
    calls = []

    def counted(function: Any, *args: Any) -> Tensor:
        calls.append(function)
        return checkpoint(function, *args, use_reentrant=use_reentrant)

    module.gradient_checkpointing = True
    module._gradient_checkpointing_func = counted
    torch.testing.assert_close(run(module, arguments, prepared=prepared), expected)
    assert len(calls) == 1
    module.eval()
    module(**arguments)
    assert len(calls) == 1, "nothing is to be saved outside training"


def test_transformers_finds_the_switch_of_activation_checkpointing() -> None:
    """``activation_checkpointing_enable`` sets these two names on every module that has the first."""
    module = block()
    assert module.gradient_checkpointing is False
    module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    assert set(module.state_dict()) == set(block().state_dict())


@every_pair_of_grids
@every_interaction
def test_compiles_without_graph_breaks(interaction: str, grids: tuple[Grid, Grid]) -> None:
    module, arguments = block(interaction=interaction, zero_init=False), image(*grids)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments), module(**arguments))


@pytest.mark.parametrize("strict", [False, True])
@every_pair_of_grids
@every_interaction
def test_exports(interaction: str, grids: tuple[Grid, Grid], strict: bool) -> None:
    module, arguments = block(interaction=interaction, zero_init=False).eval(), image(*grids)
    program = torch.export.export(module, (), arguments, strict=strict)
    torch.testing.assert_close(program.module()(**arguments), module(**arguments))


@every_interaction
def test_no_tiles_are_no_error_and_leave_no_parameter_without_gradient(interaction: str) -> None:
    """As in a batch of text alone, on one of several processes that train together."""
    module = block(interaction=interaction)
    arguments = {k: x[:0] if isinstance(x, Tensor) else x for k, x in image().items()}
    output = module(**arguments)
    assert output.shape == (0, math.prod(EVEN[0]), D)
    output.sum().backward()
    assert not [name for name, parameter in module.named_parameters() if parameter.grad is None]


@every_interaction
def test_tokens_given_are_left_as_they_were(interaction: str) -> None:
    arguments = image()
    before = arguments["tokens"].clone()
    block(interaction=interaction, zero_init=False)(**arguments)
    assert torch.equal(arguments["tokens"], before)


def test_the_default_block_learns_to_read_a_single_cell() -> None:
    """The target is the lower right of the four cells under each token; their average would miss three quarters."""
    module, arguments = block(attn_dim=64, num_heads=4), image()
    tokens = arguments["tokens"] / 1000
    arguments.update(tokens=tokens, saliency=None)
    cells = arguments["features"].unflatten(1, EVEN[1])[:, 1::2, 1::2].flatten(1, 2)
    target = tokens + cells[..., :D]
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = (module(**arguments) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_features_on_another_device_are_named() -> None:
    arguments = image()
    arguments["features"] = arguments["features"].to("meta")
    with pytest.raises(ValueError, match="tokens cpu, features meta"):
        block()(**{**arguments, "saliency": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_grid": (4, 5)}, "24 positions.*4x5.*20"),
        ({"feature_grid": (8, 11)}, "96 positions.*8x11.*88"),
        ({"tokens": torch.zeros(2, 24, D + 1)}, r"tokens \(2, 24, 17\): expected \(B, h\*w, 16\)"),
        ({"tokens": torch.zeros(24, D)}, r"tokens \(24, 16\): expected \(B, h\*w, 16\)"),
        ({"features": torch.zeros(2, 96, C + 1)}, "feature_dim=24"),
        ({"features": torch.zeros(1, 96, C), "saliency": None}, "2 token grids.*1 images"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block()(**{**image(), **change})


def test_a_prepared_image_of_another_grid_or_batch_is_an_error() -> None:
    module, arguments = block(), image()
    prepared = module.prepare(arguments["features"], feature_grid=EVEN[1])
    arguments.update(features=prepared, saliency=None)
    with pytest.raises(ValueError, match=r"prepared for feature_grid=\(8, 12\), not for \(8, 11\)"):
        module(**{**arguments, "feature_grid": (8, 11)})
    with pytest.raises(ValueError, match="1 token grids, but 2 prepared images"):
        module(**{**arguments, "tokens": arguments["tokens"][:1]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interaction": "sella"}, "did you mean 'sela'"),
        ({"windw": 2}, "no option 'windw': did you mean 'window'"),
    ],
)
def test_unknown_options_are_errors_with_a_suggestion(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block(**options)
