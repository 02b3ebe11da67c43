"""Vision Remember in ms-swift, by a callback called "vision_remember".

ms-swift imports files that its command line names. One such file, say ``remember.py``, holds the choices::

    from vision_remember.adapters.ms_swift import register

    register(layers=[1, 4], phase=1)  # leave the phase out where LoRA chooses what trains

and ``swift sft --external_plugins remember.py --callbacks vision_remember ...`` attaches, saves an adapter folder in
every checkpoint, and resumes exactly.
"""

from __future__ import annotations

from typing import Any

from vision_remember.adapters.trainer import VisionRememberCallback

try:
    from swift.callbacks import callbacks_map
except ImportError as error:
    raise ImportError(f"vision_remember.adapters.ms_swift is a part of ms-swift, which is missing: {error}") from error

NAME = "vision_remember"


def register(**options: Any) -> None:
    """Makes ``--callbacks vision_remember`` known to ms-swift.

    Args:
        **options: of :class:`vision_remember.adapters.trainer.VisionRememberCallback`.
    """

    def build(args: Any, trainer: Any) -> VisionRememberCallback:
        """As ms-swift builds its callbacks: the callback's own hooks get model and arguments from the Trainer."""
        return VisionRememberCallback(**options)

    callbacks_map[NAME] = build
