"""The two phases in a plain loop of PyTorch, with accelerate: `python -m examples.train --backend loop ...`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from examples.train.options import parse
from examples.train.setup import Run, checkpoints, prepare
from vision_remember.adapters.sharding import is_sharded
from vision_remember.adapters.trainer import ADAPTER_FOLDER

HEEDED = {
    *("output_dir", "resume_from_checkpoint", "seed", "data_seed", "use_cpu", "bf16", "tf32", "report_to"),
    *("logging_steps", "save_steps", "save_total_limit", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "max_grad_norm", "dataloader_num_workers"),
    *("ddp_find_unused_parameters", "ddp_backend", "ddp_timeout"),
}
"""The settings of a Trainer that this loop has too."""

_OF_NO_CONSEQUENCE = {
    *("remove_unused_columns", "disable_tqdm", "accelerator_config", "local_rank", "do_train", "dataloader_pin_memory"),
}


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: steps done.
        epoch: epochs done.
        rows: conversations of this epoch done, by all processes.
        losses: of the steps that were logged.
    """

    step: int = 0
    epoch: int = 0
    rows: int = 0
    losses: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """For accelerate's checkpoints."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.__dict__.update(state)


class Loop:
    """The loop; all of its state is in accelerate's checkpoints.

    Args:
        run: model, data and optimiser.
        args: how to train.
    """

    def __init__(self, run: Run, args: TrainingArguments) -> None:
        assert args.output_dir is not None
        self.run, self.args, self.output_dir = run, args, Path(args.output_dir)
        kind, options = run.optimizer
        unused = args.ddp_find_unused_parameters
        if unused is None:  # an encoder that trains has blocks behind the last one that is read
            unused = any(group["name"] == "encoder" for group in options["params"])
        self.accelerator = Accelerator(
            cpu=args.use_cpu,
            mixed_precision="bf16" if args.bf16 else None,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.data_seed or args.seed),
            log_with=args.report_to or None,
            project_dir=args.output_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
        loader = DataLoader(
            run.conversations,
            batch_size=args.per_device_train_batch_size,
            shuffle=True,
            collate_fn=DataCollatorForVisionLanguageModeling(run.processor, assistant_only_loss=True),
            num_workers=args.dataloader_num_workers,
            # Of its own, or a resumed run would draw once more from the generator of the model's random numbers.
            generator=torch.Generator(),
        )
        self.model, self.optimizer, self.loader = self.accelerator.prepare(run.model, kind(**options), loader)
        per_epoch = ceil(len(self.loader) / args.gradient_accumulation_steps)
        self.steps = args.max_steps if args.max_steps > 0 else ceil(args.num_train_epochs * per_epoch)
        self.rows_at_once = args.per_device_train_batch_size * self.accelerator.num_processes
        # Not prepared: accelerate would step it once for each process.
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=args.get_warmup_steps(self.steps),
            num_training_steps=self.steps,
            scheduler_specific_kwargs=cast("dict[str, Any] | None", args.lr_scheduler_kwargs),
        )
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.scheduler, self.progress)
        if args.report_to:
            self.accelerator.init_trackers("vision_remember")

    def train(self) -> list[float]:
        """From the run's checkpoint, if it has one, to the last step; returns the losses that were logged."""
        progress, args = self.progress, self.args
        log_every, save_every = (_steps(every, self.steps) for every in (args.logging_steps, args.save_steps))
        if self.run.checkpoint is not None:
            self.accelerator.load_state(str(self.run.checkpoint))
        self.model.train()
        while progress.step < self.steps:
            self.loader.set_epoch(progress.epoch)
            loader = self.accelerator.skip_first_batches(self.loader, progress.rows // self.rows_at_once)
            for batches in grouped(loader, args.gradient_accumulation_steps):
                loss = self.step(batches)
                progress.step += 1
                progress.rows += len(batches) * self.rows_at_once
                if progress.step % log_every == 0:
                    self.log(loss)
                if progress.step % save_every == 0 or progress.step == self.steps:
                    self.save()
                if progress.step == self.steps:
                    break
            progress.epoch, progress.rows = progress.epoch + 1, 0
        return progress.losses

    def step(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """One step of the optimiser; the loss is the mean over the answers' tokens of all batches and processes."""
        accelerator = self.accelerator
        answers = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in batches]).sum()
        answers = accelerator.reduce(answers, "sum")
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches, 1):
            with nullcontext() if number == len(batches) else accelerator.no_sync(self.model):
                loss = self.model(**batch, num_items_in_batch=answers, use_cache=False).loss
                # Processes' gradients are averaged, and these are parts of a sum.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        if self.args.max_grad_norm > 0:  # 0 means no limit, as for the Trainer
            accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return total

    def log(self, loss: Tensor) -> None:
        """Prints the loss of the last step, and gives it to the trackers."""
        value = self.accelerator.reduce(loss, "sum").item()
        self.progress.losses.append(value)
        rate = self.scheduler.get_last_lr()[0]
        self.accelerator.print(f"step {self.progress.step}/{self.steps}, loss {value:.4f}, learning rate {rate:.2e}")
        self.accelerator.log({"loss": value, "learning_rate": rate}, step=self.progress.step)

    def save(self) -> None:
        """Writes a checkpoint aside and renames it: there is none that is not whole."""
        accelerator, aside = self.accelerator, self.output_dir / ".saving"
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(aside))
            self.save_adapter(aside / ADAPTER_FOLDER)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # a full disk has better uses
            raise
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            target = self.output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.progress.step}"
            if target.exists():
                shutil.rmtree(target)
            os.rename(aside, target)
            others = [folder for folder in checkpoints(self.output_dir) if folder != target]
            if (limit := self.args.save_total_limit or 0) > 0:
                for old in others[: max(0, len(others) + 1 - limit)]:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def save_adapter(self, folder: Path) -> None:
        """Saves the adapter, from the first process or, of a model in shards, from all."""
        if self.accelerator.is_main_process or is_sharded(self.model):
            self.run.handle.save_pretrained(folder)

    def save_model(self, folder: Path) -> None:
        """Saves the model as transformers does."""
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            self.run.model.save_pretrained(folder, state_dict=state, save_original_format=False)


def grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of so many batches; the last may be shorter."""
    left = iter(batches)
    while group := list(islice(left, size)):
        yield group


def refuse_ignored(args: TrainingArguments) -> None:
    """Raises ValueError for settings of a Trainer that somebody chose and this loop does not have."""
    ignored = []
    for each in fields(args):
        value, usual = getattr(args, each.name), None if each.default is MISSING else each.default
        # What is off has several spellings.
        if each.name not in HEEDED | _OF_NO_CONSEQUENCE and value != usual and (value or usual):
            ignored.append(f"{each.name}={getattr(value, 'value', value)!r}")
    if ignored:
        raise ValueError(f"{', '.join(ignored)}: the plain loop has no such setting; train by --backend trainer")


def _steps(every: float, steps: int) -> int:
    """So many steps; a number below 1 is a share of all steps, as for the Trainer."""
    return ceil(steps * every) if every < 1 else int(every)


def main(argv: list[str] | None = None) -> list[float]:
    """Trains; returns the losses that were logged."""
    options, args = parse(argv, TrainingArguments)
    refuse_ignored(args)
    run = prepare(options, args)
    loop = Loop(run, args)
    losses = loop.train()
    if options.phase == 2:
        loop.save_model(loop.output_dir / "model")
    loop.save_adapter(loop.output_dir / "adapter")
    loop.accelerator.end_training()
    return losses
