"""Two models for the harness that need no weights: one that knows every answer, one that sees nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms

from benchmarks.local_tasks import LOCAL_TASKS, LocalTask
from benchmarks.official_tasks import BENCHMARKS


class _ReferenceModel(lmms):  # type: ignore[misc] # lmms-eval has no types
    is_simple = False

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        answers = []
        for request in requests:
            *_, to_messages, _, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            assert to_messages(document)[-1]["role"] == "user"
            answers.append(self._say(_TASKS[task], document))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError("the local tasks generate")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError("the local tasks ask once")

    def _say(self, task: LocalTask, document: Any) -> str:
        raise NotImplementedError


class Oracle(_ReferenceModel):
    """Says what the document holds as its answer."""

    def _say(self, task: LocalTask, document: Any) -> str:
        return task.answer(document)


class Blind(_ReferenceModel):
    """Says the same to every question of a task."""

    def _say(self, task: LocalTask, document: Any) -> str:
        return task.blind


_TASKS = {benchmark.local_task: LOCAL_TASKS[benchmark.name] for benchmark in BENCHMARKS.values()}
