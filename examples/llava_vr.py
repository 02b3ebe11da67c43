"""The paper's models in their two sizes, on the meta device: counted, not loaded.

python -m examples.llava_vr
"""

from __future__ import annotations

import torch

from vision_remember import build_llava_vr
from vision_remember.adapters.llava_vr import llava_vr_configs


def main() -> list[str]:
    """Prints both and returns their sizes."""
    with torch.device("meta"):
        models = [build_llava_vr(*llava_vr_configs(size)) for size in ("0.9B", "2.0B")]
    for model in models:
        print(model)
    return [model.size for model in models]


if __name__ == "__main__":
    main()
