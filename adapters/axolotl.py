"""Vision Remember in axolotl, by a plugin. In axolotl's YAML:

    plugins:
      - vision_remember.adapters.axolotl.VisionRememberPlugin
    vision_remember:
      layers: [1, 4]
      phase: 1        # leave it out where LoRA chooses what trains

Attached once the model is built and before any LoRA; adapter folders are saved in every checkpoint. The projector is
the model's own: axolotl's data would not know of another number of image tokens.
"""

from __future__ import annotations

from typing import Any

from vision_remember.adapters.attach import attach_vision_remember
from vision_remember.adapters.trainer import VisionRememberCallback

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError as error:
    raise ImportError(f"vision_remember.adapters.axolotl is a plugin of axolotl, which is missing: {error}") from error


class VisionRememberArgs(BaseModel):
    """What the plugin adds to axolotl's configuration: arguments of ``attach_vision_remember``, and ``phase``."""

    vision_remember: dict[str, Any] | None = None


class VisionRememberPlugin(BasePlugin):  # type: ignore[misc]
    """Attaches Vision Remember to the model that axolotl trains."""

    def get_input_args(self) -> str:
        """Where axolotl finds :class:`VisionRememberArgs`."""
        return f"{__name__}.{VisionRememberArgs.__name__}"

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Attaches; raises ValueError as ``attach_vision_remember`` does."""
        options = {name: value for name, value in (cfg.vision_remember or {}).items() if name != "phase"}
        attach_vision_remember(model, **options)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[VisionRememberCallback]:
        """The callback that saves adapters, resumes exactly and chooses what trains."""
        return [VisionRememberCallback(phase=(cfg.vision_remember or {}).get("phase"))]
