"""Hosts that are told to return tuples: by their configuration or by the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.upstream.hosts import HOSTS, ModelTester
from vision_remember import attach_vision_remember

PACKED = [host for host in HOSTS if host.startswith("qwen")]


def flat(output: Any) -> list[torch.Tensor]:
    """All tensors of a tuple of tensors and sequences of them, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for part in output or () for tensor in flat(part)]


@pytest.mark.parametrize("told_by", ["configuration", "call"])
@pytest.mark.parametrize(("host", "modality"), [*((host, "image") for host in HOSTS), *((h, "video") for h in PACKED)])
def test_a_caller_who_wants_tuples_gets_the_hosts_own(host: str, modality: str, told_by: str) -> None:
    torch.manual_seed(0)
    config, inputs = ModelTester(host).prepare_config_and_inputs_for_common()
    call = {"return_dict": False} if told_by == "call" else {}
    config.return_dict = bool(call)
    model = HOSTS[host].model_class(config).eval()
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}[modality]
    images = dict(zip(names, (inputs["pixel_values"], inputs.get("image_grid_thw")), strict=True))
    if "image_sizes" in inputs:
        images["image_sizes"] = inputs["image_sizes"]
    images = {name: value for name, value in images.items() if value is not None}

    def run() -> list[tuple[Any, ...]]:
        with torch.no_grad():
            return [getattr(part, f"get_{modality}_features")(**images, **call) for part in (model, model.model)]

    expected = run()
    attach_vision_remember(model, [0, 1])
    for output, plain in zip(run(), expected, strict=True):
        assert isinstance(output, tuple)
        assert len(output) == len(plain)
        assert all(torch.equal(a, b) for a, b in zip(flat(output), flat(plain), strict=True))
