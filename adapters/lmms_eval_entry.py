"""What lmms-eval finds by the entry point group ``lmms_eval.models``.

Apart from the plug-in itself: importing that imports lmms-eval, which looks for its plug-ins at once, and would find a
module that is not complete yet.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "vision_remember"
"""What ``--model`` is given."""


def manifest() -> Any:
    """What lmms-eval registers; the plug-in is imported when its model is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path="vision_remember.adapters.lmms_eval.LmmsEvalModel")
