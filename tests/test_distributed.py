"""Several processes: DDP and FSDP2 train the blocks as one process does, and batches without images stop nobody."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.distributed import (
    BATCHES,
    CHECKPOINTING,
    PROCESSES,
    SECONDS,
    WAYS,
    file_of,
    gradients,
    loss,
    model_and_handle,
    work,
)
from tests.fingerprint import Fingerprint
from tests.hosts import batch, build_llava
from tests.processors import llava_processor
from vision_remember import attach_vision_remember, load_vision_remember


@pytest.fixture(name="folder", scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote, once for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    processes = torch.multiprocessing.spawn(work, (str(folder),), PROCESSES, join=False)
    # A process that waits for the other fails by itself after SECONDS; the deadline is for one that does not.
    deadline = time.monotonic() + 4 * SECONDS
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("the processes still wait for each other")
    return folder


@functools.cache
def expected(images: tuple[tuple[int, ...], ...]) -> dict[str, torch.Tensor]:
    """The mean over the processes' losses, differentiated in one."""
    model = model_and_handle(None)[0]
    sum(loss(model, images[rank], rank) for rank in range(PROCESSES)).div(PROCESSES).backward()
    return gradients(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_equal_those_of_one_process(folder: Path, way: str, mode: str, name: str) -> None:
    alone, together = expected(BATCHES[name]), torch.load(folder / file_of(way, mode, name))
    assert alone.keys() <= together.keys()
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, alone.get(key, torch.zeros_like(gradient)), atol=1e-5, rtol=1e-4, msg=key)
    blocks = [gradient for key, gradient in together.items() if "vision_remember" in key]
    assert len(blocks) == 2 * 8
    assert all(gradient.abs().sum() > 0 for gradient in blocks) == (name != "text-only")


def test_an_adapter_saved_from_shards_is_whole(folder: Path) -> None:
    twin = build_llava()
    load_vision_remember(twin, folder / "adapter", llava_processor("clip", 32, 4))
    model, inputs = model_and_handle(None)[0].eval(), batch(twin)
    with torch.no_grad():
        torch.testing.assert_close(twin(**inputs).logits, model(**inputs).logits)


@pytest.fixture(name="alone")
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_sharded_model_is_refused() -> None:
    model = build_llava()
    fully_shard(model.model.language_model.layers[2])
    before = Fingerprint(model)
    with pytest.raises(ValueError, match="sharded already"):
        attach_vision_remember(model, [1])
    before.check(model)
