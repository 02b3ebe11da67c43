"""The training scripts in two processes: as in one, side by side (DDP) and in shards (FSDP2), and they resume."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader

from examples.train import tiny
from tests.launched_training import FSDP2
from tests.training_runs import CONFIGS, ROOT, STEPS, flags, run, same, weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]


def launch(way: str, backend: str, folder: Path, **options: object) -> None:
    """Two processes, each with half of a step's conversations."""
    words = flags(backend, folder, gradient_accumulation_steps=1, **options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, "-m", "tests.launched_training", way, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-6000:]


@pytest.fixture(name="alone", scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("alone")

    def without_dropout(vocabulary: int, made: Any = tiny.language_config) -> Any:
        config = made(vocabulary)
        config.attention_dropout = 0.0
        return config

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiny, "language_config", without_dropout)
        run("loop", folder)
    return weights(folder)


@pytest.mark.parametrize("backend", ["loop", "trainer", "trl"])
@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_two_processes_train_as_one_and_resume(
    way: str, backend: str, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    launch(way, backend, tmp_path / "straight")
    found = left_by(tmp_path / "straight")
    assert found.keys() == alone.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, alone[name], atol=2e-4, rtol=1e-3, msg=name)
    checkpoint = tmp_path / "straight" / f"checkpoint-{STEPS - 2}"
    in_shards = sorted(checkpoint.glob("pytorch_model_fsdp*"))
    assert bool(in_shards) == (way == "FSDP2")
    for folder in in_shards:
        assert len(FileSystemReader(str(folder)).read_metadata().state_dict_metadata) > 0
    shutil.copytree(checkpoint, tmp_path / "resumed" / checkpoint.name)
    launch(way, backend, tmp_path / "resumed", resume=True)
    assert same(left_by(tmp_path / "resumed"), found)


def test_an_encoder_trains_in_two_processes(tmp_path: Path) -> None:
    """Nobody reads its last block, whose gradients the other process must not wait for."""
    launch("DDP", "loop", tmp_path / "loop", train_encoder=True)
    launch("DDP", "trainer", tmp_path / "trainer", train_encoder=True)
    one, other = (left_by(tmp_path / backend) for backend in ("loop", "trainer"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=2e-4, rtol=1e-3, msg=name)


def left_by(folder: Path) -> dict[str, torch.Tensor]:
    """The weights; put together from shards, those that two parts share come twice."""
    found = weights(folder)
    head = found.pop("lm_head.weight", None)
    assert head is None or torch.equal(head, found["model.language_model.embed_tokens.weight"])
    return found


def test_the_shards_are_those_of_the_configuration() -> None:
    settings = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
    names = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "fsdp_transformer_layer_cls_to_wrap"}
    for name, value in FSDP2.items():
        if name.startswith("FSDP"):
            assert str(settings[names.get(name, name.lower())]).lower() == value.lower(), name
