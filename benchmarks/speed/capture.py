"""What it costs to keep levels of the encoder and to read saliency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from benchmarks.speed.hosts import encoder_config
from benchmarks.speed.measure import Plan, Result, measure
from vision_remember import MultiLevelTap


def run(plan: Plan) -> list[Result]:
    """CLIP-L/14 at 336 pixels, one tile."""
    torch.manual_seed(0)
    config = encoder_config(plan.small)
    encoder = hf.CLIPVisionModel(config).to(plan.device, plan.dtype).eval()
    pixels = torch.randn(1, 3, config.image_size, config.image_size, device=plan.device, dtype=plan.dtype)
    eager = hf.CLIPVisionModel._from_config(config, attn_implementation="eager").to(plan.device, plan.dtype).eval()
    eager.load_state_dict(encoder.state_dict())

    def captured(**options: Any) -> Callable[[], Any]:
        tap = MultiLevelTap(encoder, (13, 18, 23), **options)

        @torch.no_grad()
        def forward() -> Any:
            with tap.capture() as seen:
                encoder(pixels)
            return seen.levels, seen.saliency

        return forward

    candidates = {
        "encoder alone": torch.no_grad()(lambda: encoder(pixels)),
        "three levels": captured(saliency=None),
        "three levels and saliency": captured(),
        "whole attention maps": torch.no_grad()(lambda: eager(pixels, output_attentions=True)),
    }
    return measure(plan, "CLIP-L/14 336" if not plan.small else "tiny", candidates)
