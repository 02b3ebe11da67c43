"""What the processes of test_distributed run; a module of its own, because each process imports it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from tests.hosts import batch, build_llava, randomise, set_checkpointing
from vision_remember import attach_vision_remember, compress_projector
from vision_remember.adapters.activation_checkpointing import HOOKS_STAY_OUTSIDE
from vision_remember.adapters.load import restore_vision_remember
from vision_remember.adapters.sharding import whole

PROCESSES = 2
SECONDS = 60
"""After which a collective that waits for the other process gives up."""

# Images of each sample, by process. The second process has none in the second batch, and both have none in the third.
BATCHES = {"images": ((1, 2), (2, 1)), "one rank text-only": ((1, 2), (0, 0)), "text-only": ((0, 0), (0, 0))}
CHECKPOINTING: dict[str, bool | None] = {"no checkpointing": None, "non-reentrant": False, "reentrant": True}
WAYS = ["DDP", "FSDP2", "FSDP2, block in a group of its own"]
ALL_WAYS = [*WAYS, "FSDP1"]
"""With the first version of FSDP, which shards into flat tensors: for evaluation."""


def works_with_the_host(way: str, mode: str) -> bool:
    """Before 5.23 re-entrant layers recompute their hooks: two of them use one parameter, which DDP does not allow."""
    return HOOKS_STAY_OUTSIDE or (way, mode) != ("DDP", "reentrant")


def model_and_handle(use_reentrant: bool | None, **phase: Any) -> tuple[Any, Any]:
    model = build_llava().train()
    compress_projector(model, None, "adaptive_avg_pool", ratio=4)
    handle = attach_vision_remember(model, [1, 3])
    randomise(handle)
    handle.set_phase(2, **phase)
    set_checkpointing(model, use_reentrant=use_reentrant)
    return model, handle


def loss(model: Any, images: tuple[int, ...], rank: int) -> torch.Tensor:
    host = getattr(model, "module", model)
    inputs = batch(host, images, seed=rank)
    return model(**inputs, labels=inputs["input_ids"]).loss


def logits(model: Any, rank: int) -> torch.Tensor:
    """Without gradients, where a block's keys and values may be made ahead of its call."""
    with torch.no_grad():
        return model(**batch(getattr(model, "module", model), (1, 2), seed=rank)).logits


def distributed(way: str, model: Any) -> Any:
    if way == "DDP":
        return DistributedDataParallel(model)
    if way == "FSDP1":
        layers = ModuleWrapPolicy({type(model.model.language_model.layers[0])})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=layers, use_orig_params=True, device_id=cpu)
    for layer in model.model.language_model.layers:
        if "own" in way and hasattr(layer, "vision_remember"):
            fully_shard(layer.vision_remember)
        fully_shard(layer)
    return fully_shard(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    host = getattr(model, "module", model)
    return {name: whole(p.grad).clone() for name, p in host.named_parameters() if p.grad is not None}


def work(rank: int, folder: str) -> None:
    """Every way with every batch; the first process writes the gradients to ``folder``."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=SECONDS))
    for way in WAYS:
        for mode, use_reentrant in CHECKPOINTING.items():
            if not works_with_the_host(way, mode):
                continue
            model = distributed(way, model_and_handle(use_reentrant)[0])
            for name, images in BATCHES.items():
                model.zero_grad()
                loss(model, images[rank], rank).backward()
                found = gradients(model)
                if rank == 0:
                    torch.save(found, Path(folder, file_of(way, mode, name)))
    for way in ALL_WAYS:
        model = distributed(way, model_and_handle(None)[0].eval())
        found = logits(model, rank)
        if rank == 0:
            torch.save(found, Path(folder, f"{way}; logits.pt"))
    save_and_restore(Path(folder))
    refuse_flat_shards(Path(folder))
    dist.destroy_process_group()


def save_and_restore(folder: Path) -> None:
    """Under FSDP2: an adapter folder is written, and read into the shards of another model."""
    model, handle = model_and_handle(None)
    distributed(WAYS[-1], model)
    handle.save_pretrained(folder / "adapter")
    dist.barrier()
    other, fresh = model_and_handle(None)
    with torch.no_grad():
        for parameter in fresh.module.parameters():
            parameter.zero_()
    distributed(WAYS[-1], other)
    restore_vision_remember(other, folder / "adapter")
    for mine, read in zip(handle.module.parameters(), fresh.module.parameters(), strict=True):
        assert torch.equal(whole(mine), whole(read))


def refuse_flat_shards(folder: Path) -> None:
    """Those of FSDP's first version are in no shape to be saved."""
    model, handle = model_and_handle(None)
    handle.check_savable()
    distributed("FSDP1", model)
    for ask in (handle.check_savable, lambda: handle.save_pretrained(folder / "flat")):
        with pytest.raises(ValueError, match=r"has shape \(.*, but whole it has \(.*from shards of FSDP2"):
            ask()
    assert not (folder / "flat").exists()


def file_of(way: str, mode: str, name: str) -> str:
    return f"{way}; {mode}; {name}.pt"
