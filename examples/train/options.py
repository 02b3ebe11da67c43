"""What the scripts are told, by flags or by a YAML file: `--config FILE`, which flags overrule."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml  # type: ignore[import-untyped]
from transformers import TrainingArguments
from trl import TrlParser  # type: ignore[attr-defined]

Arguments = TypeVar("Arguments", bound=TrainingArguments)

_ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass
class Options:
    """Everything but the settings of training itself, which are those of transformers' ``TrainingArguments``."""

    model: str | None = field(
        default=None,
        metadata={"help": '"tiny", or a LLaVA or LLaVA-NeXT: a folder or repository'},
    )
    vision: str | None = field(
        default=None,
        metadata={"help": "instead of model: the encoder of a LLaVA-VR, e.g. openai/clip-vit-large-patch14-336"},
    )
    language: str | None = field(
        default=None, metadata={"help": "instead of model: its language model, e.g. Qwen/Qwen2-0.5B"}
    )
    tiles: int = field(default=0, metadata={"help": "tiles an image is cut into at most; 0 in phase 1, 4 in phase 2"})
    phase: int = field(default=1, metadata={"help": "1: projector and blocks train; 2: the language model too"})
    train_encoder: bool = field(default=False, metadata={"help": "in phase 2: the vision encoder too"})
    adapter: str | None = field(default=None, metadata={"help": "adapter folder to start from: that of phase 1"})
    data: str = field(default="rendered", metadata={"help": 'conversations in LLaVA\'s format, or "rendered" ones'})
    images: str | None = field(default=None, metadata={"help": "folder of the images; default: that of the data"})
    bad_rows: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "rows that cannot be trained on stop the run or are skipped, and are named"},
    )
    check_images: Literal["exist", "decode"] = field(
        default="exist", metadata={"help": "whether images are only looked for, or decoded, before training starts"}
    )
    projector: str = field(default="adaptive_avg_pool", metadata={"help": "an entry of PROJECTORS"})
    ratio: int = field(default=4, metadata={"help": "encoder cells per vision token"})
    layers: list[int] = field(
        default_factory=lambda: [1, 4], metadata={"help": "decoder layers before which a block runs"}
    )
    preset: str = field(default="default", metadata={"help": '"default" or "paper"'})
    chat_template: str | None = field(
        default=None, metadata={"help": "a Jinja file, here or beside the YAML file; default: the processor's own"}
    )
    vr_lr: float | None = field(default=None, metadata={"help": "learning rate of the blocks; default: learning_rate"})
    projector_lr: float | None = field(default=None, metadata={"help": "learning rate of the projector"})
    encoder_lr: float | None = field(default=None, metadata={"help": "learning rate of the vision encoder"})
    global_batch: int | None = field(
        default=None, metadata={"help": "conversations per step, all processes and accumulation together"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the last complete checkpoint in output_dir"})

    def __post_init__(self) -> None:
        if (self.vision is None) != (self.language is None) or (self.model is None) == (self.vision is None):
            raise ValueError(
                f"model={self.model!r}, vision={self.vision!r}, language={self.language!r}: expected a model, or an "
                "encoder and a language model"
            )
        if self.phase not in (1, 2):
            raise ValueError(f"phase={self.phase}: expected 1 or 2")


def parse(argv: list[str] | None, kind: type[Arguments], **defaults: Any) -> tuple[Options, Arguments]:
    """The options and the arguments of a Trainer of some kind.

    Args:
        argv: of the command line; None for the process's own.
        kind: of the arguments.
        **defaults: of the arguments, in place of the library's own.

    Raises:
        ValueError: a YAML file that cannot be read, an unknown name in it or among the flags, or options that exclude
            each other.
        FileNotFoundError: a YAML file or a chat template that is not there.
        SystemExit: a value of another type.
    """
    parser = TrlParser([Options, kind], allow_abbrev=False)  # type: ignore[list-item]
    parser.set_defaults(remove_unused_columns=False, **defaults)
    given = sys.argv[1:] if argv is None else argv
    if given[-1:] == ["--config"]:
        raise ValueError("--config: expected a YAML file behind it")
    config = Path(given[given.index("--config") + 1]) if "--config" in given else None
    if config is not None and not config.is_file():
        raise FileNotFoundError(f"--config {config}: no such file")
    try:
        options, arguments, unknown = parser.parse_args_and_config(given, return_remaining_strings=True)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {config}: this is no YAML: {error}") from error
    if unknown:
        names = [*Options.__dataclass_fields__, *kind.__dataclass_fields__]
        close = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0], names, n=1)
        hint = f"did you mean --{close[0]}? " if close else ""
        raise ValueError(f"unknown arguments {' '.join(map(str, unknown))}: {hint}--help lists them all")
    if options.chat_template is not None:
        options.chat_template = str(_template(Path(options.chat_template), config))
    if arguments.optim not in _ADAMW or arguments.optim_args or arguments.optim_target_modules:
        optim = getattr(arguments.optim, "value", arguments.optim)
        raise ValueError(
            f"optim={optim!r}, optim_args={arguments.optim_args!r}, optim_target_modules="
            f"{arguments.optim_target_modules!r}: these scripts train by AdamW, a group for each part of the model"
        )
    if arguments.save_total_limit == 1:
        raise ValueError("save_total_limit=1: the last good checkpoint would go before the next is whole; 2 or more")
    return options, arguments


def _template(named: Path, config: Path | None) -> Path:
    """The file of a chat template: as named from here, or from the folder of the YAML file."""
    places = [named, *([] if config is None else [config.parent / named])]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"chat_template={named}: no file {' and no file '.join(map(str, places))}")
