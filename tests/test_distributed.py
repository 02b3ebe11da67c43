"""Several processes: DDP and FSDP2 train the blocks as one process does, and batches without images stop nobody."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes

from tests.accelerated import RATE, STEPS
from tests.distributed import (
    ALL_WAYS,
    BATCHES,
    CHECKPOINTING,
    PROCESSES,
    SECONDS,
    WAYS,
    file_of,
    gradients,
    logits,
    loss,
    model_and_handle,
    work,
    works_with_the_host,
)
from tests.fingerprint import Fingerprint
from tests.hosts import batch, build_llava
from tests.processors import llava_processor
from tests.zoo_checks import subject
from vision_remember import attach_vision_remember, load_vision_remember
from vision_remember.adapters.checkpoint import WEIGHTS_FILE

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(name="folder", scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote, once for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.set_forkserver_preload([work.__module__])  # so that torch is imported once
    processes = start_processes(work, (str(folder),), PROCESSES, join=False, start_method="forkserver")
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
    """The gradients of one process that has the batches of all."""
    model = model_and_handle(None)[0]
    mean_loss(model, images).backward()
    return gradients(model)


def mean_loss(model: Any, images: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    return torch.stack([loss(model, counts, rank) for rank, counts in enumerate(images)]).mean()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_equal_those_of_one_process(folder: Path, way: str, mode: str, name: str) -> None:
    if not works_with_the_host(way, mode):
        pytest.skip("before transformers 5.23, DDP and re-entrant activation checkpointing exclude each other")
    alone, together = expected(BATCHES[name]), torch.load(folder / file_of(way, mode, name))
    assert alone.keys() <= together.keys()
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, alone.get(key, torch.zeros_like(gradient)), atol=1e-5, rtol=1e-4, msg=key)
    blocks = [gradient for key, gradient in together.items() if "vision_remember" in key]
    assert len(blocks) == 2 * 8
    assert all(gradient.abs().sum() > 0 for gradient in blocks) == (name != "text-only")


@pytest.mark.parametrize("way", ALL_WAYS)
def test_evaluation_equals_that_of_one_process(folder: Path, way: str) -> None:
    alone = logits(model_and_handle(None)[0].eval(), 0)
    torch.testing.assert_close(torch.load(folder / f"{way}; logits.pt"), alone)


def test_an_adapter_saved_from_shards_is_whole(folder: Path) -> None:
    twin = build_llava()
    load_vision_remember(twin, folder / "adapter", llava_processor("clip", 32, 4))
    model, inputs = model_and_handle(None)[0].eval(), batch(twin)
    with torch.no_grad():
        torch.testing.assert_close(twin(**inputs).logits, model(**inputs).logits)


def test_one_process_alone_gives_the_projector_no_gradient_without_images() -> None:
    """As the host by itself: an optimiser skips what has none."""
    model, _ = model_and_handle(None)
    loss(model, (0, 0), 0).backward()
    assert all(p.grad is None for p in model.model.multi_modal_projector.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if "vision_remember" in n)


LAUNCHERS = {
    # On CPUs, accelerate starts one process; more take torchrun or MPI.
    "accelerate": ("accelerate.commands.launch --cpu --num_processes 1 --mixed_precision no --dynamo_backend no", 1),
    "torchrun": ("torch.distributed.run --standalone --nproc_per_node 2", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launched_loop_trains_as_one_process_does(launcher: str, tmp_path: Path) -> None:
    options, processes = LAUNCHERS[launcher]
    command = [sys.executable, "-m", *options.split(), "-m", "tests.accelerated", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, check=True, cwd=ROOT, timeout=4 * SECONDS, env=environment)
    model, handle = model_and_handle(None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        mean_loss(model, BATCHES["one rank text-only"][:processes]).backward()
        optimizer.step()
    handle.save_pretrained(tmp_path / "alone")
    expected, found = (load_file(folder / WEIGHTS_FILE) for folder in (tmp_path / "alone", tmp_path))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


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


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("model_type", ["llava_next", "ovis2", "deepseek_vl_hybrid"])
def test_all_that_trains_has_a_gradient_without_images(model_type: str) -> None:
    """What hosts have beside encoder and projector too: the end of a row of tiles, a table of visual words."""
    host = subject(model_type)
    host.attach().set_phase(2)
    ids = torch.randint(5, 20, (1, 7))
    host.model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
    assert not [name for name, p in host.model.named_parameters() if p.requires_grad and p.grad is None]
