"""The rendered benchmark: pages whose every detail is known, in the paper's four groups, at three sizes of detail."""

from __future__ import annotations

from vision_remember.synth.base import GROUPS, Aspect, Board, Question, Scene, Task
from vision_remember.synth.labels import LABEL_PARTS, LABELS, PARTS
from vision_remember.synth.page import LEVELS, SPLITS, Sheet
from vision_remember.synth.rows import rows
from vision_remember.synth.scene import TASKS, make_scene, vocabulary

__all__ = [
    "GROUPS",
    "LABELS",
    "LABEL_PARTS",
    "LEVELS",
    "PARTS",
    "SPLITS",
    "TASKS",
    "Aspect",
    "Board",
    "Question",
    "Scene",
    "Sheet",
    "Task",
    "make_scene",
    "rows",
    "vocabulary",
]
