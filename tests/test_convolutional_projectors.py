"""LDP and the C-Abstractor, against their networks written out and the models they come from."""

from __future__ import annotations

import math
from types import SimpleNamespace as Config
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.perception_lm.modeling_perception_lm import PerceptionLMMultiModalProjector

from tests.rasters import C, D, image, projector, random_features, randomised, same, sequence
from vision_remember.grid import Grid
from vision_remember.projectors import LDP, CAbstractor, LDPv2

# LDP


def released_ldp() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.mlp.1.weight": (D, C), "model.mlp.1.bias": (D,), "model.mlp.3.weight": (D, D), "model.mlp.3.bias": (D,),
    }  # fmt: skip
    for i in (1, 2):
        block: dict[str, tuple[int, ...]] = {
            "0.0.weight": (D, 1, 3, 3), "0.1.weight": (D,), "0.1.bias": (D,),
            "1.fc1.weight": (D // 4, D, 1, 1), "1.fc1.bias": (D // 4,), "1.fc2.weight": (D, D // 4, 1, 1),
            "1.fc2.bias": (D,), "2.0.weight": (D, D, 1, 1), "2.1.weight": (D,), "2.1.bias": (D,),
        }  # fmt: skip
        shapes |= {f"model.mb_block.{i}.block.{key}": shape for key, shape in block.items()}
    return randomised(shapes)


def channel_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return (x - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize("grid", [(6, 6), (5, 8)], ids=str)
def test_ldp_is_the_network_of_its_release(grid: Grid) -> None:
    state, given = released_ldp(), random_features(grid)
    x = F.gelu(F.linear(given, state["model.mlp.1.weight"], state["model.mlp.1.bias"]))
    x = image(F.linear(x, state["model.mlp.3.weight"], state["model.mlp.3.bias"]), grid)
    for i, stride in ((1, 1), (2, 2)):
        name = f"model.mb_block.{i}.block"
        y = F.conv2d(x, state[f"{name}.0.0.weight"], stride=stride, padding=1, groups=D)
        y = F.hardswish(channel_norm(y, state, f"{name}.0.1"))
        gate = F.relu(F.conv2d(y.mean((2, 3), True), state[f"{name}.1.fc1.weight"], state[f"{name}.1.fc1.bias"]))
        y = y * F.hardsigmoid(F.conv2d(gate, state[f"{name}.1.fc2.weight"], state[f"{name}.1.fc2.bias"]))
        y = channel_norm(F.conv2d(y, state[f"{name}.2.0.weight"]), state, f"{name}.2.1")
        x = x + y if stride == 1 else y
    module = projector("ldp", ratio=4)
    module.load_state_dict(LDP.import_state_dict(state))
    same(module(given, grid), sequence(x))


@pytest.mark.parametrize(
    ("grid", "out_grid", "stride"), [((24, 24), (12, 8), (2, 3)), ((27, 27), (14, 9), (2, 3)), ((5, 8), (5, 2), (1, 4))]
)
def test_ldp_finds_the_stride_of_a_fixed_grid(grid: Grid, out_grid: Grid, stride: Grid) -> None:
    module = projector("ldp", out_grid=out_grid)
    assert module.stride(grid, module.out_grid(grid)) == stride
    assert module(random_features(grid), grid).shape[1] == math.prod(out_grid)


def test_ldp_refuses_a_grid_that_no_stride_makes() -> None:
    with pytest.raises(ValueError, match=r"out_grid=12x12: no stride makes it of .* 27x27; a stride of 3x3 makes 9x9"):
        projector("ldp", out_grid=(12, 12)).out_grid((27, 27))


def test_ldpv2_is_perception_lms_projector_plus_its_convolution() -> None:

    config: Any = Config(
        vision_config=Config(model_args={"embed_dim": C}), text_config=Config(hidden_size=D), projector_pooling_ratio=2
    )
    theirs = PerceptionLMMultiModalProjector(config)
    module = projector("ldpv2", ratio=4)
    module.load_state_dict(
        {**theirs.state_dict(), **randomised({"position.weight": (D, 1, 3, 3), "position.bias": (D,)})}
    )
    given = random_features((24, 24))
    pooled = image(theirs(given), (12, 12))
    expected = pooled + F.conv2d(pooled, module.position.weight, module.position.bias, padding=1, groups=D)
    same(module(given), sequence(expected), 1e-6)
    for parameter in module.position.parameters():
        nn.init.zeros_(parameter)
    same(module(given), theirs(given), 1e-6)


def test_ldpv2_reads_its_release() -> None:
    state = randomised(
        {
            "mlp.mlp.0.weight": (D, C), "mlp.mlp.0.bias": (D,), "mlp.mlp.2.weight": (D, D), "mlp.mlp.2.bias": (D,),
            "peg.peg.0.weight": (D, 1, 3, 3), "peg.peg.0.bias": (D,),
        }
    )  # fmt: skip
    module, given = projector("ldpv2", out_grid=(3, 4)), random_features((6, 12))
    module.load_state_dict(LDPv2.import_state_dict(state))
    x = F.gelu(F.linear(given, state["mlp.mlp.0.weight"], state["mlp.mlp.0.bias"]))
    x = image(F.linear(x, state["mlp.mlp.2.weight"], state["mlp.mlp.2.bias"]), (6, 12))
    x = F.avg_pool2d(x, (2, 3))
    x = x + F.conv2d(x, state["peg.peg.0.weight"], state["peg.peg.0.bias"], padding=1, groups=D)
    same(module(given, (6, 12)), sequence(x))


def test_a_token_of_ldpv2_depends_on_its_own_cells_and_its_neighbours_alone() -> None:
    module = projector("ldpv2", ratio=4)
    given = random_features((24, 24)).requires_grad_()
    module(given)[0, 5 * 12 + 6].sum().backward()
    seen = given.grad[0].abs().sum(-1).unflatten(0, (24, 24)) > 0  # type: ignore[index]
    expected = torch.zeros(24, 24, dtype=torch.bool)
    expected[8:14, 10:16] = True
    assert torch.equal(seen, expected)


# C-Abstractor


def released_c_abstractor(*, hidden: int = C, depth: int = 2, positions: int = 36) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "pos_emb": (1, positions, C), "readout.0.weight": (D, hidden), "readout.0.bias": (D,),
        "readout.2.weight": (D, D), "readout.2.bias": (D,),
    }  # fmt: skip
    for stage, i in [(stage, i) for stage in (0, 2) for i in range(1, depth + 1)]:
        width = C if (stage, i) == (0, 1) else hidden
        block: dict[str, tuple[int, ...]] = {
            "conv1.conv.weight": (hidden, width, 1, 1), "conv2.conv.weight": (hidden, 1, 3, 3),
            "conv3.conv.weight": (hidden, hidden, 1, 1), "se.fc1.weight": (width // 4, hidden, 1, 1),
            "se.fc1.bias": (width // 4,), "se.fc2.weight": (hidden, width // 4, 1, 1), "se.fc2.bias": (hidden,),
        }  # fmt: skip
        block |= {f"conv{k}.bn.{name}": (hidden,) for k in (1, 2, 3) for name in ("weight", "bias")}
        if width != hidden:
            block |= {"downsample.conv.weight": (hidden, width, 1, 1)}
            block |= {f"downsample.bn.{name}": (hidden,) for name in ("weight", "bias")}
        shapes |= {f"net.{stage}.b{i}.{key}": shape for key, shape in block.items()}
    return randomised(shapes)


def released_block(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    y = F.silu(channel_norm(F.conv2d(x, state[f"{name}.conv1.conv.weight"]), state, f"{name}.conv1.bn"))
    y = F.conv2d(y, state[f"{name}.conv2.conv.weight"], padding=1, groups=y.shape[1])
    y = F.silu(channel_norm(y, state, f"{name}.conv2.bn"))
    gate = F.silu(F.conv2d(y.mean((2, 3), True), state[f"{name}.se.fc1.weight"], state[f"{name}.se.fc1.bias"]))
    y = y * torch.sigmoid(F.conv2d(gate, state[f"{name}.se.fc2.weight"], state[f"{name}.se.fc2.bias"]))
    y = channel_norm(F.conv2d(y, state[f"{name}.conv3.conv.weight"]), state, f"{name}.conv3.bn")
    if f"{name}.downsample.conv.weight" in state:
        x = channel_norm(F.conv2d(x, state[f"{name}.downsample.conv.weight"]), state, f"{name}.downsample.bn")
    return F.silu(x + y)


@pytest.mark.parametrize(("hidden", "depth"), [(C, 2), (16, 1), (C, 0)])
def test_the_c_abstractor_is_the_network_of_its_release(hidden: int, depth: int) -> None:
    state, given = released_c_abstractor(hidden=hidden, depth=depth), random_features((6, 6))
    x = image(given + state["pos_emb"], (6, 6))
    for i in range(depth):
        x = released_block(x, state, f"net.0.b{i + 1}")
    x = F.adaptive_avg_pool2d(x, (4, 3))
    for i in range(depth):
        x = released_block(x, state, f"net.2.b{i + 1}")
    x = F.silu(F.linear(sequence(x), state["readout.0.weight"], state["readout.0.bias"]))
    expected = F.linear(x, state["readout.2.weight"], state["readout.2.bias"])
    module = projector("c_abstractor", out_grid=(4, 3), hidden_dim=hidden, depth=depth, position_grid=(6, 6))
    module.load_state_dict(CAbstractor.import_state_dict(state))
    same(module(given), expected)


def test_the_c_abstractor_drops_the_position_of_a_cls_token() -> None:
    state = released_c_abstractor(positions=37)
    assert torch.equal(CAbstractor.import_state_dict(state)["position"], state["pos_emb"][0, 1:])


def test_every_token_of_the_c_abstractor_depends_on_all_features() -> None:
    module = projector("c_abstractor", ratio=4, depth=1).double()
    given = random_features((6, 6)).double().requires_grad_()
    for token in (0, 4, 8):
        (gradient,) = torch.autograd.grad(module(given)[0, token].square().sum(), given)
        assert (gradient[0].abs().sum(-1) > 0).all()


def test_positions_of_the_c_abstractor_are_interpolated_to_other_grids() -> None:
    module = projector("c_abstractor", ratio=4, position_grid=(6, 4))
    plain = projector("c_abstractor", ratio=4, position_grid=None)
    plain.load_state_dict({key: value for key, value in module.state_dict().items() if key != "position"})
    for grid in ((6, 4), (5, 8)):
        raster = F.interpolate(image(module.position[None], (6, 4)), size=grid, mode="bicubic", align_corners=False)
        given = random_features(grid)
        same(module(given, grid), plain(given + sequence(raster), grid), 1e-6)
    assert not hasattr(plain, "position")
    assert plain.options()["position_grid"] is None


@pytest.mark.parametrize("options", [{"depth": -1}, {"mlp_depth": 0}, {"position_grid": (0, 4)}], ids=str)
def test_impossible_options_of_the_c_abstractor_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        projector("c_abstractor", **options)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_c_abstractors_mlp_has_the_layers_asked_for(depth: int) -> None:
    module = projector("c_abstractor", ratio=4, mlp_depth=depth)
    assert [type(layer) for layer in module.readout] == [nn.Linear, nn.SiLU] * (depth - 1) + [nn.Linear]
