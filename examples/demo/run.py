"""The demo from pages to results."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import vision_remember

from .arms import ARMS, Arm, Pretrained, load_arm
from .looks import Look, look_at, prefill_seconds
from .pages import Pages
from .questions import KINDS, bag_ceiling
from .settings import Settings
from .stages import SHOWN_PAGE, Stages

PREFILL_BATCH = 8
VR_ARM = "pooled + VR"


@dataclass(frozen=True)
class Outcome:
    """Everything the report shows.

    Attributes:
        results: Plain data, as written to results.json.
        page: The test page that the report shows, alone in its batch.
        readings: What each arm answers to every question about it, first seed.
        look: The Vision Remember arm's view of it, first seed.
    """

    results: dict[str, Any]
    page: Pages
    readings: dict[str, list[str]]
    look: Look


def run(settings: Settings, directory: Path) -> Outcome:
    """Trains and measures all arms; finished stages are read from `directory`."""
    start, cpu_start = time.perf_counter(), time.process_time()
    stages = Stages(settings, directory)
    encoder, decoder = stages.encoder(), stages.decoder()
    pretrained = Pretrained(model=decoder["model"] | encoder["model"], places=decoder["places"])
    trained = {(name, seed): stages.arm(name, seed, pretrained) for name, seed in stages.runs}
    stages.close()

    seed = settings.seeds[0]
    first = {name: load_arm(name, trained[name, seed]["model"], pretrained, seed) for name in ARMS}
    seconds = prefill_seconds(first, stages.test[:PREFILL_BATCH], settings.prefill_repeats)
    page = stages.test[SHOWN_PAGE : SHOWN_PAGE + 1]
    results = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vision_remember": vision_remember.__version__,
        },
        "threads": torch.get_num_threads(),
        "settings": asdict(settings),
        "seconds_this_run": round(time.perf_counter() - start, 1),
        "cpu_seconds_this_run": round(time.process_time() - cpu_start, 1),
        "chance": {kind.name: kind.chance for kind in KINDS},
        "bag_ceiling": bag_ceiling(),
        "pretraining": {"encoder": encoder["accuracy"], "decoder": decoder["accuracy"]},
        "arms": {
            name: _costs(arm, seconds[name], seconds["pooled"])
            | {"seeds": [_measured(seed, trained[name, seed]) for seed in settings.seeds]}
            for name, arm in first.items()
        },
    }
    readings = {name: trained[name, seed]["reading"] for name in ARMS}
    return Outcome(results, page, readings, look_at(first[VR_ARM], page))


def _costs(arm: Arm, seconds: float, pooled_seconds: float) -> dict[str, Any]:
    return {
        "vision_tokens": arm.vision_tokens,
        "trained_parameters": sum(p.numel() for p in arm.model.parameters() if p.requires_grad),
        "added_parameters": arm.added_parameters,
        "prefill_ms": round(1000 * seconds, 2),
        "prefill_ratio": round(seconds / pooled_seconds, 3),
    }


def _measured(seed: int, trained: dict[str, Any]) -> dict[str, Any]:
    return {"seed": seed} | {name: trained[name] for name in ("accuracy", "curve", "seconds")}
