"""The table of hosts: multimodal models by their ``config.model_type``."""

from vision_remember.adapters.llava import LLAVA
from vision_remember.adapters.llava_next import LLAVA_NEXT
from vision_remember.adapters.spec import MLLMSpec
from vision_remember.registry import Registry

HOSTS: Registry[MLLMSpec] = Registry("host", {spec.name: spec for spec in (LLAVA, LLAVA_NEXT)})
