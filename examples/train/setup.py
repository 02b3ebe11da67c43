"""What the three scripts share: data, model, optimiser, and where a run goes on."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from examples.train.conversations import Conversations
from examples.train.options import Options
from examples.train.rendered import write_rendered
from examples.train.tiny import build_tiny
from vision_remember import attach_vision_remember, build_llava_vr, compress_projector
from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.load import restore_vision_remember
from vision_remember.adapters.repo_id import is_repo_id
from vision_remember.adapters.trainer import ADAPTER_FOLDER

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that can start.

    Attributes:
        model: attached, with what trains chosen.
        processor: emits as many placeholders as the model has tokens.
        handle: of Vision Remember.
        conversations: the data.
        optimizer: class and arguments, a group for each part of the model.
        checkpoint: to go on from; None at the start.
    """

    model: PreTrainedModel
    processor: Any
    handle: VisionRememberHandle
    conversations: Conversations
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]]
    checkpoint: Path | None


def prepare(options: Options, args: TrainingArguments) -> Run:
    """Checks everything that can be checked, then loads data and model.

    Raises:
        ValueError: options that do not fit each other, the data or the model.
        FileNotFoundError: data, images, a model or a checkpoint that is not there.
    """
    logging.basicConfig(format="%(levelname)s %(message)s")
    checkpoint = _checkpoint(options, args)
    if options.global_batch is not None:
        args.gradient_accumulation_steps = _accumulation(options.global_batch, args)
    with args.main_process_first(desc="data"):
        conversations = _conversations(options, args)
    set_seed(args.seed)
    model, processor = _model(options, args.seed)
    if options.chat_template is not None:
        processor.chat_template = Path(options.chat_template).read_text()
    _check_template(processor)
    handle = attached_handle(model, options)
    if options.adapter is not None:
        restore_vision_remember(model, options.adapter)
    handle.set_phase(1 if options.phase == 1 else 2, train_encoder=options.train_encoder)
    print(f"{len(conversations)} conversations, {len(conversations.problems)} skipped")
    return Run(model, processor, handle, conversations, _optimizer(handle, options, args), checkpoint)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The last whole checkpoint; None if there is none. Those that a kill or a full disk cut short are passed over."""
    for folder in reversed(checkpoints(output_dir)):
        if (folder / ADAPTER_FOLDER).is_dir():  # the last that is written, and whole or not there
            return folder
        logger.warning("%s was cut short while it was written; going on from the one before it", folder)
    return None


def attached_handle(model: PreTrainedModel, options: Options) -> VisionRememberHandle:
    """The handle of a model's Vision Remember, which is attached if need be."""
    attachment = find_attachment(model)
    if attachment is not None:
        return VisionRememberHandle(attachment)
    return attach_vision_remember(model, options.layers, preset=options.preset)


def _checkpoint(options: Options, args: TrainingArguments) -> Path | None:
    assert args.output_dir is not None
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint is not None:
        named = Path(args.resume_from_checkpoint)
        if not (named / ADAPTER_FOLDER).is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint={named}: no whole checkpoint of these scripts")
        return named
    found = checkpoints(output_dir)
    if found and not options.resume:
        raise ValueError(f"{output_dir} holds {found[-1].name}: go on with --resume, or name another output_dir")
    return last_checkpoint(output_dir)


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders, whole or not, in the order of their steps."""
    numbered = [(_CHECKPOINT.fullmatch(path.name), path) for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def _accumulation(global_batch: int, args: TrainingArguments) -> int:
    at_once = args.per_device_train_batch_size * args.world_size
    if global_batch < 1 or global_batch % at_once:
        raise ValueError(
            f"global_batch={global_batch}: expected a multiple of {args.per_device_train_batch_size} per device times "
            f"{args.world_size} processes"
        )
    return global_batch // at_once


def _conversations(options: Options, args: TrainingArguments) -> Conversations:
    assert args.output_dir is not None
    file = Path(options.data)
    if options.data == "rendered":
        file = Path(args.output_dir, "rendered", "conversations.json")
        file = file if file.is_file() else write_rendered(file.parent)
    return Conversations(file, options.images, bad_rows=options.bad_rows, check_images=options.check_images)


def _model(options: Options, seed: int) -> tuple[PreTrainedModel, Any]:
    kinds: dict[str, Any] = {"projector": options.projector, "ratio": options.ratio, "preset": options.preset}
    if options.model == "tiny":
        built = build_tiny(options.tiles, seed, layers=options.layers, **kinds)
        return built.model, built.processor
    if options.vision is not None and options.language is not None:
        built = build_llava_vr(
            options.vision, options.language, tiles=options.tiles, layers=options.layers, dtype=torch.float32, **kinds
        )
        return built.model, built.processor
    assert options.model is not None
    if not Path(options.model).is_dir() and not is_repo_id(options.model):
        raise FileNotFoundError(
            f"model={options.model}: not 'tiny', and neither a folder nor a repository id (owner/name)"
        )
    if options.tiles:
        raise ValueError(f"tiles={options.tiles}: {options.model} cuts images up as it does; tiles go with vision=")
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(options.model)
    compress_projector(model, processor, options.projector, ratio=options.ratio)
    return model, processor


def _check_template(processor: Any) -> None:
    if not re.search(r"{%-?\s*generation\s*-?%}", processor.chat_template or ""):
        raise ValueError(
            "the chat template does not mark the answers by {% generation %}, so that nothing would train: name one "
            "that does, --chat_template FILE"
        )


def _optimizer(
    handle: VisionRememberHandle, options: Options, args: TrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    groups = handle.parameter_groups(
        args.learning_rate,
        vr_lr=options.vr_lr,
        projector_lr=options.projector_lr,
        encoder_lr=options.encoder_lr,
        weight_decay=args.weight_decay,
    )
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW, {"params": groups, "lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
