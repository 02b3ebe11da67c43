"""A training loop with accelerate, for `accelerate launch -m tests.accelerated FOLDER` and `torchrun`."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator

from tests.distributed import BATCHES, loss, model_and_handle

STEPS, RATE = 3, 1e-3


def main(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    model, handle = model_and_handle(None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    rank, images = accelerator.process_index, BATCHES["one rank text-only"]
    for _ in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(loss(model, images[rank], rank))
        optimizer.step()
    if accelerator.is_main_process:
        handle.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
