"""Vision Remember in a training loop of your own: plain PyTorch, nothing but the public API.

    python -m examples.own_training_loop

A tiny LLaVA with random weights is given a pooling projector and Vision Remember, and trained for a minute on questions
about rendered pages, in the paper's two phases. It is then saved, loaded into a fresh model, and asked. That Vision
Remember brings back what pooling loses takes a model that can read: see `python -m examples.demo`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor

from examples.demo.models import build_model, build_processor
from examples.demo.pages import Pages, render_pages
from examples.demo.questions import PAGE_QUESTIONS, QUESTIONS, VOCABULARY, answers
from vision_remember import attach_vision_remember, compress_projector, load_vision_remember

BATCH = 16
FIRST_QUESTION = QUESTIONS.index(PAGE_QUESTIONS[0])  # a page's tint and ink: what a minute of training can teach


def batches(processor: LlavaProcessor, pages: Pages, steps: int, seed: int) -> Iterator[BatchFeature]:
    """Random questions about random pages, as inputs with labels: only the answer counts towards the loss."""
    generator = torch.Generator().manual_seed(seed)
    truth = answers(pages)
    for _ in range(steps):
        chosen = torch.randint(len(pages), (BATCH,), generator=generator).tolist()
        asked = torch.randint(len(PAGE_QUESTIONS), (BATCH,), generator=generator) + FIRST_QUESTION
        texts = [
            f"<image> {QUESTIONS[question]} {VOCABULARY[truth[page, question]]}"
            for page, question in zip(chosen, asked.tolist(), strict=True)
        ]
        inputs = processor(text=texts, images=[pages.image(page) for page in chosen], return_tensors="pt")
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -1] = inputs["input_ids"][:, -1]
        inputs["labels"] = labels
        yield inputs


def train(model: nn.Module, inputs: Iterator[BatchFeature], lr: float, report_every: int) -> list[float]:
    """The loop: whatever requires a gradient is trained. Returns every step's loss."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    losses: list[float] = []
    model.train()
    for batch in inputs:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % report_every == 0:
            recent = losses[-report_every:]
            print(f"  step {len(losses):3d}, loss {sum(recent) / len(recent):.3f}")
    model.eval()
    return losses


@torch.no_grad()
def ask(model: LlavaForConditionalGeneration, processor: LlavaProcessor, pages: Pages, question: str) -> list[str]:
    """The model's answers to one question about each page."""
    images = [pages.image(page) for page in range(len(pages))]
    inputs = processor(text=[f"<image> {question}"] * len(images), images=images, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=1, do_sample=False)  # type: ignore[misc]
    return processor.batch_decode(output[:, -1:])


def main(steps: int = 120, seed: int = 0) -> list[float]:
    """Trains, saves, loads and asks; returns the losses of both phases."""
    model, processor = build_model(seed), build_processor()
    pages, test = render_pages(512, seed + 1), render_pages(8, seed + 2)

    # 144 vision tokens become 36. The processor is told, so that prompts hold as many placeholders.
    compression = compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    vr = attach_vision_remember(model, layers=[1, 3], levels=[2, 4, 6])
    print(vr)

    # The paper's phases: first the projector and the blocks, then the decoder too.
    vr.set_phase(1)
    losses = train(model, batches(processor, pages, steps // 3, seed + 1), lr=2e-3, report_every=10)
    vr.set_phase(2)
    losses += train(model, batches(processor, pages, steps - steps // 3, seed + 2), lr=1e-3, report_every=10)

    question = "page-tint"
    before = ask(model, processor, test, question)
    with tempfile.TemporaryDirectory() as folder:
        # The adapter folder holds the blocks and the projector. What remains is an ordinary model of transformers.
        adapter, base = Path(folder, "adapter"), Path(folder, "base")
        vr.save_pretrained(adapter)
        vr.detach()
        compression.restore()
        model.save_pretrained(base)

        fresh = LlavaForConditionalGeneration.from_pretrained(base)
        fresh_processor = build_processor()
        load_vision_remember(fresh, adapter, fresh_processor)
    after = ask(fresh, fresh_processor, test, question)

    truth = [VOCABULARY[token] for token in answers(test)[:, QUESTIONS.index(question)].tolist()]
    print(f"{question}: the loaded model says {after}")
    print(f"{' ' * len(question)}             the truth is {truth}")
    if after != before:
        raise RuntimeError(f"saving and loading changed the answers {before}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.steps, options.seed)
