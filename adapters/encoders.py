"""The table of vision encoders."""

from __future__ import annotations

from torch import nn

from vision_remember.adapters.clip import CLIP
from vision_remember.adapters.siglip import SIGLIP
from vision_remember.encoder import EncoderSpec
from vision_remember.registry import Registry

ENCODERS: Registry[EncoderSpec] = Registry("encoder", {spec.name: spec for spec in (CLIP, SIGLIP)})


def encoder_spec(encoder: nn.Module) -> EncoderSpec:
    """The spec of an encoder, by the names of its class and its base classes.

    Raises:
        ValueError: no spec describes it; the message shows how to give one.
    """
    # Base classes too: FSDP, for one, replaces a module's class with a subclass.
    names = {cls.__name__ for cls in type(encoder).__mro__}
    for spec in ENCODERS.values():
        if names.intersection(spec.classes):
            return spec
    raise ValueError(
        f"{type(encoder).__name__} is no known vision encoder ({', '.join(ENCODERS)}); describe it with an EncoderSpec "
        "and pass MultiLevelTap(encoder, spec=...) or attach_vision_remember(model, spec=MLLMSpec(encoder_spec=...))"
    )
