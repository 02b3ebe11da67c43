"""The README of an adapter folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from vision_remember.adapters.repo_id import is_repo_id

_TEMPLATE = """---
library_name: vision-remember
tags:
- vision-remember
- multimodal{base_model}
---

# Vision Remember adapter

Blocks that let each vision token re-read the image features under it, before decoder layers {layers} of
{host}. The base model is needed to use it:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from vision_remember import load_vision_remember

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
vr = load_vision_remember(model, "{folder}", processor)
```

| | |
|---|---|
| encoder levels (`hidden_states` indices) | {levels} |
| interaction | {interaction} |
| saliency | {saliency} |
| projector | {projector} |
| parameters | {parameters:,} |
"""


def model_card(description: dict[str, Any], tensors: dict[str, Tensor], shown_as: str | None = None) -> str:
    """The card of an adapter with this ``adapter_config.json`` and these weights, loaded from ``shown_as``."""
    base, config, projector = description["base"], description["config"], description["projector"]
    name = base["name_or_path"]
    # The hub knows repository ids only; a local path would be a broken link there.
    is_repo = name is not None and is_repo_id(name) and not Path(name).exists()
    return _TEMPLATE.format(
        base_model=f"\nbase_model: {name}" if is_repo else "",
        folder=shown_as or "path/to/this/folder",
        name=name if is_repo else "the-base-model",
        host=f"{base['class']} ({base['encoder']} encoder, {base['decoder']} decoder)",
        layers=", ".join(map(str, config["layers"])),
        levels=", ".join(map(str, config["levels"])),
        interaction=config["interaction"],
        saliency=config["saliency"] or "none",
        projector=projector["name"] if projector else "the base model's own",
        parameters=sum(tensor.numel() for tensor in tensors.values()),
    )
