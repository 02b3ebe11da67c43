"""The table of vision encoders: those whose modules do not tell all. Any other is described by its modules."""

from __future__ import annotations

from torch import nn

from vision_remember.adapters.clip import CLIP
from vision_remember.adapters.describe import describe_encoder
from vision_remember.adapters.qwen_vit import QWEN2_5_VIT, QWEN2_VIT
from vision_remember.adapters.siglip import SIGLIP
from vision_remember.encoder import EncoderSpec
from vision_remember.registry import Registry

ENCODERS: Registry[EncoderSpec] = Registry(
    "encoder", {spec.name: spec for spec in (CLIP, SIGLIP, QWEN2_VIT, QWEN2_5_VIT)}
)


def known_encoder(encoder: nn.Module) -> EncoderSpec | None:
    """The spec of an encoder in the table, by the names of its class and its base classes; None if it is in none."""
    # Base classes too: FSDP, for one, replaces a module's class with a subclass.
    names = {cls.__name__ for cls in type(encoder).__mro__}
    return next((spec for spec in ENCODERS.values() if names.intersection(spec.classes)), None)


def encoder_spec(encoder: nn.Module) -> EncoderSpec:
    """The spec of an encoder: from the table, or else read off its modules.

    Raises:
        ValueError: nothing tells where the blocks are, or in which order the cells stand.
    """
    if (known := known_encoder(encoder)) is not None:
        return known
    described = describe_encoder(encoder)
    if len(described) > 1:
        orders = " or ".join(repr(spec.order) for spec in described)
        raise ValueError(
            f"{type(encoder).__name__} is no known vision encoder ({', '.join(ENCODERS)}), and its cells may stand in "
            f"order {orders}: give the spec, MultiLevelTap(encoder, spec=EncoderSpec(order=...))"
        )
    return described[0]
