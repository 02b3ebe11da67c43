"""Vision Remember in the Trainer of transformers, and in whatever is built on it (TRL's trainers, for one)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vision_remember.adapters.attach import attach_vision_remember
from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.load import restore_vision_remember
from vision_remember.adapters.resolve import unwrapped
from vision_remember.adapters.sharding import is_sharded

ADAPTER_FOLDER = Path("vision_remember", "adapter")
"""The adapter inside a checkpoint: one level down, or a Trainer that resumes takes it for an adapter of PEFT."""

_TRAINER_STATE = "trainer_state.json"


class VisionRememberCallback(TrainerCallback):
    """Attaches Vision Remember, saves an adapter folder in every checkpoint, and makes resuming exact.

    Compress the projector before, and prepare the data with the processor that was given to ``compress_projector``.

    By itself, a Trainer that resumes LLaVA restores no weight: the checkpoint has the names of files, the model has
    others, and only a warning tells. With this callback the names are translated, the blocks are read from their
    adapter folder, and a checkpoint that does not fit is an error. The same holds for ``load_best_model_at_end``.

    Args:
        layers: as for :func:`vision_remember.attach_vision_remember`; leave it out for a model with Vision Remember.
        phase: what trains, see :meth:`VisionRememberHandle.set_phase`; None leaves that to you (and to PEFT).
        train_encoder: as for ``set_phase``; goes with a phase.
        **options: further arguments of ``attach_vision_remember``.

    Raises:
        ValueError: when the Trainer is built: arguments for a model with Vision Remember, a phase for a PEFT model,
            ``train_encoder`` without a phase, blocks or a compressed projector that LoRA adapts, since no adapter
            folder can hold that, or what ``attach_vision_remember`` and ``set_phase`` refuse. When it trains: a model
            that ``model_init`` made anew, or shards that cannot be saved. When it resumes: a checkpoint without an
            adapter, or of another run.
    """

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        *,
        phase: Literal[1, 2] | None = None,
        train_encoder: bool = False,
        **options: Any,
    ) -> None:
        self._attach_options = options if layers is None else {"layers": layers, **options}
        self._phase = phase
        self._train_encoder = train_encoder
        self._model: nn.Module | None = None
        self._handle: VisionRememberHandle | None = None

    @property
    def handle(self) -> VisionRememberHandle:
        """The handle of the model that the Trainer was given.

        Raises:
            RuntimeError: no Trainer was built with this callback yet.
        """
        if self._handle is None:
            raise RuntimeError("no Trainer was built with this callback yet, so nothing is attached")
        return self._handle

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attaches, before the optimiser is made."""
        model: nn.Module = kwargs["model"]
        host = unwrapped(model)
        if self._phase is not None and host is not model:
            raise ValueError(f"phase={self._phase}: in a PEFT model, PEFT chooses what trains; leave the phase out")
        if self._phase is None and self._train_encoder:
            raise ValueError("train_encoder=True without a phase would have no effect: phase=2 trains the encoder too")
        self._model, attachment = model, find_attachment(model)
        if attachment is None:
            self._handle = attach_vision_remember(model, **self._attach_options)
        elif not self._attach_options:
            self._handle = VisionRememberHandle(attachment)
        else:
            raise ValueError(
                f"Vision Remember is attached to this {type(host).__name__} already, so {self._attach_options} would "
                "have no effect: give them to attach_vision_remember, or to the callback alone"
            )
        try:
            self._handle.check_savable()
            if self._phase is not None:
                self._handle.set_phase(self._phase, train_encoder=self._train_encoder)
        except ValueError:
            if attachment is None:
                self._handle.detach()
            raise
        if host is model:
            attached = find_attachment(model)
            assert attached is not None
            attached.keep(host.register_load_state_dict_pre_hook(translate_names))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks whether this model trains and can be saved; after a resume: restores the blocks and the projector."""
        assert self._model is not None
        if find_attachment(kwargs["model"]) is not find_attachment(self._model):
            raise ValueError(
                "the Trainer trains another model than the one that has Vision Remember: model_init makes one anew; "
                "pass the model itself, Trainer(model, ...)"
            )
        self.handle.check_savable()
        if state.global_step:
            self._restore(_resumed_checkpoint(args, state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves the adapter folder, the last part of a checkpoint: where it is, the checkpoint is whole."""
        self.save(_checkpoint(args, state) / ADAPTER_FOLDER, args)

    def save(self, folder: Path, args: TrainingArguments) -> None:
        """Saves an adapter folder. Every process calls this; one writes."""
        assert self._model is not None
        if args.should_save or is_sharded(self._model):
            self.handle.save_pretrained(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With ``load_best_model_at_end``: restores the best checkpoint's blocks."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._restore(Path(state.best_model_checkpoint))

    def _restore(self, checkpoint: Path) -> None:
        folder = checkpoint / ADAPTER_FOLDER
        if not folder.is_dir():
            raise ValueError(f"{checkpoint} has no {ADAPTER_FOLDER}: it was written without VisionRememberCallback")
        assert self._model is not None
        restore_vision_remember(self._model, folder)


def translate_names(
    module: PreTrainedModel,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Hook of ``load_state_dict``: tensors named as in the model's files get the names that the model has.

    Names that are neither fail the load even with ``strict=False``, as a Trainer calls it: it would go on with weights
    that were never restored.
    """
    own = module.state_dict(prefix=prefix).keys()
    if state_dict.keys() <= own:
        return
    names = _names_in_files(module)
    for name in [name for name in state_dict if name.startswith(prefix) and name not in own]:
        ours = names.get(name.removeprefix(prefix))
        if ours is not None:
            state_dict[prefix + ours] = state_dict.pop(name)
    unknown = sorted(name for name in state_dict if name.startswith(prefix) and name not in own)
    if unknown:
        error_msgs.append(
            f"{len(unknown)} tensors belong nowhere in this {type(module).__name__}, so that they would not be "
            f"restored: {unknown[0]}, ... ; is the checkpoint of a model with the same Vision Remember and projector?"
        )


def _names_in_files(model: PreTrainedModel) -> dict[str, str]:
    """The model's own name of each tensor by its name in a checkpoint, as ``save_pretrained`` finds it.

    Not by saving: of several processes, only the first one would write anything.
    """
    own = list(model.state_dict())
    numbered = {name: torch.tensor(number) for number, name in enumerate(own)}
    in_files: dict[str, Tensor] = revert_weight_conversion(model, numbered)
    return {name: own[int(number)] for name, number in in_files.items()}


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where a Trainer saves now."""
    assert args.output_dir is not None
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _resumed_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where a Trainer that resumed has read from; it does not tell its callbacks.

    Raises:
        ValueError: it was somewhere else.
    """
    checkpoint = Path(args.resume_from_checkpoint) if args.resume_from_checkpoint else _checkpoint(args, state)
    file = checkpoint / _TRAINER_STATE
    saved = TrainerState.load_from_json(str(file)) if file.is_file() else None
    if saved is None or (saved.global_step, saved.log_history) != (state.global_step, state.log_history):
        raise ValueError(
            f"the Trainer resumed at step {state.global_step}, but not from {checkpoint}: name the checkpoint in "
            "TrainingArguments(resume_from_checkpoint=...) too, because a callback is not told"
        )
    return checkpoint
