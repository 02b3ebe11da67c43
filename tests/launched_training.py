"""The training scripts in several processes of a CPU, in shards if the first word is FSDP2; for torchrun."""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from examples.train import tiny
from examples.train.__main__ import main

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}
"""What `accelerate launch` makes of examples/configs/fsdp2.yaml."""


def without_dropout(made: Any = tiny.language_config) -> None:
    """Processes draw random numbers of their own, which would hide what is compared."""

    def config(vocabulary: int) -> Any:
        text = made(vocabulary)
        text.attention_dropout = 0.0
        return text

    tiny.language_config = config


def shard_on_cpus() -> None:
    """accelerate shards on accelerators alone; it is told that these are some."""
    ordinary = PartialState.__init__

    def pretending(self: Any, *args: Any, **kwargs: Any) -> None:
        ordinary(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = pretending  # type: ignore[method-assign]
    os.environ.update(FSDP2)


if __name__ == "__main__":
    without_dropout()
    if sys.argv[1] == "FSDP2":
        shard_on_cpus()
    main(sys.argv[2:])
