"""The two phases in TRL's SFTTrainer: `python -m examples.train --backend trl ...`."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from examples.train.conversations import Conversations
from examples.train.options import parse
from examples.train.setup import prepare
from examples.train.with_trainer import finish
from vision_remember.adapters.trainer import VisionRememberCallback


def main(argv: list[str] | None = None) -> list[float]:
    """Trains; returns the losses that were logged."""
    # A cut would remove image tokens; the rest is what the other scripts do.
    same: dict[str, Any] = {"assistant_only_loss": True, "bf16": False, "gradient_checkpointing": False}
    same |= {name: getattr(TrainingArguments, name) for name in ("learning_rate", "logging_steps")}
    options, args = parse(argv, SFTConfig, max_length=None, **same)
    run = prepare(options, args)
    trainer = SFTTrainer(
        run.model,
        args,
        train_dataset=as_dataset(run.conversations),
        processing_class=run.processor,
        callbacks=[VisionRememberCallback()],
        optimizer_cls_and_kwargs=run.optimizer,
    )
    return finish(trainer, run, options.phase)


def as_dataset(conversations: Conversations) -> Any:
    """Conversations as a ``datasets.Dataset``, which TRL insists on; rows and images are still read when asked for."""

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [conversations[index] for index in batch["row"]]
        return {name: [row[name] for row in rows] for name in ("messages", "images")}

    return Dataset.from_dict({"row": list(range(len(conversations)))}).with_transform(read)
