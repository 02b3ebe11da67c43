"""The table of hosts by their ``config.model_type``: those that pack image tokens in a way of their own.

All others are found out when attached.
"""

from vision_remember.adapters.granite4_vision import GRANITE4_VISION
from vision_remember.adapters.llava import LLAVA
from vision_remember.adapters.llava_next import LLAVA_NEXT
from vision_remember.adapters.llava_next_video import LLAVA_NEXT_VIDEO
from vision_remember.adapters.llava_onevision import LLAVA_ONEVISION
from vision_remember.adapters.spec import MLLMSpec
from vision_remember.registry import Registry

HOSTS: Registry[MLLMSpec] = Registry(
    "host", {spec.name: spec for spec in (GRANITE4_VISION, LLAVA, LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION)}
)
