"""The two phases in the Trainer of transformers: `python -m examples.train --backend trainer ...`."""

from __future__ import annotations

from pathlib import Path

from transformers import Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from examples.train.options import parse
from examples.train.setup import Run, prepare
from vision_remember.adapters.trainer import VisionRememberCallback


def main(argv: list[str] | None = None) -> list[float]:
    """Trains; returns the losses that were logged."""
    options, args = parse(argv, TrainingArguments)
    run = prepare(options, args)
    trainer = Trainer(
        run.model,
        args,
        train_dataset=run.conversations,
        data_collator=DataCollatorForVisionLanguageModeling(run.processor, assistant_only_loss=True),
        callbacks=[VisionRememberCallback()],
        optimizer_cls_and_kwargs=run.optimizer,
    )
    return finish(trainer, run, options.phase)


def finish(trainer: Trainer, run: Run, phase: int) -> list[float]:
    """Trains and saves the adapter, in phase 2 the model beside it; returns the losses that were logged."""
    assert trainer.args.output_dir is not None
    output_dir = Path(trainer.args.output_dir)
    checkpoint = None if run.checkpoint is None else str(run.checkpoint)
    if checkpoint is not None:
        trainer.args.resume_from_checkpoint = checkpoint  # a callback is told nothing else
    trainer.train(resume_from_checkpoint=checkpoint)
    if phase == 2:  # by hand: of a model in shards, save_model leaves nothing that transformers can load
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.args.should_save:
            run.model.save_pretrained(output_dir / "model", state_dict=state, save_original_format=False)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, VisionRememberCallback))
    callback.save(output_dir / "adapter", trainer.args)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
