"""What a long run leaves behind: `python -m benchmarks.reliability` calls generate() a thousand times and counts.

Memory of the process, live tensors and live Python objects are read after a warm-up and at the end, for a LLaVA with
Vision Remember attached and for the same LLaVA without. The images change with every call.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from vision_remember import __version__, attach_vision_remember

_WARM_UP = 100
_IMAGE_TOKEN = 90


@dataclass(frozen=True)
class Level:
    """What is alive at one moment.

    Attributes:
        calls: calls of generate() so far.
        resident_mib: resident memory of the process.
        tensors: live tensors.
        objects: objects that the garbage collector tracks.
    """

    calls: int
    resident_mib: float
    tensors: int
    objects: int

    @classmethod
    def now(cls, calls: int) -> Level:
        """Counts after a full collection."""
        gc.collect()
        alive = gc.get_objects()
        # By type, not isinstance: that would call __class__ of lazy modules.
        tensors = sum(issubclass(type(item), torch.Tensor) for item in alive)
        resident = psutil.Process().memory_info().rss / 2**20
        return cls(calls, round(resident, 1), tensors, len(alive))


def small_llava() -> Any:
    """A LLaVA with random weights: 64 patches, 4 decoder layers."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, image_size=64, patch_size=8
    )
    text = transformers.Qwen2Config(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=_IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config).eval()


def long_run(model: Any, calls: int) -> tuple[Level, Level]:
    """Levels after the warm-up and after ``calls`` further calls."""
    before = Level.now(0)
    for call in range(_WARM_UP + calls):
        if call == _WARM_UP:
            before = Level.now(call)
        images = 1 + call % 3
        ids = torch.tensor([[3] + [_IMAGE_TOKEN] * 64 * images + [4, 5]])
        pixels = torch.randn(images, 3, 64, 64)
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=4, do_sample=False
        )
    return before, Level.now(_WARM_UP + calls)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs both, prints a table, writes ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="calls after the warm-up (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/reliability.json"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in ("plain", "attached"):
        model = small_llava()
        if name == "attached":
            handle = attach_vision_remember(model, layers=[1, 3])
            with torch.no_grad():
                for parameter in handle.module.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        before, after = long_run(model, arguments.calls)
        found[name] = {"before": asdict(before), "after": asdict(after)}
        print(
            f"{name:<9} {arguments.calls} calls: memory {before.resident_mib} -> {after.resident_mib} MiB, "
            f"tensors {before.tensors} -> {after.tensors}, objects {before.objects} -> {after.objects}"
        )
    versions = {
        "vision_remember": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    result = {"date": date.today().isoformat(), "calls": arguments.calls, "versions": versions, **found}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
