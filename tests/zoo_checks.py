"""What must hold for Vision Remember on any host, one function for each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.fingerprint import Fingerprint
from tests.hosts import randomise
from tests.zoo import build_host, call_inputs, extended
from vision_remember import attach_vision_remember, load_vision_remember
from vision_remember.adapters.handle import VisionRememberHandle
from vision_remember.adapters.resolve import HostParts, resolve

LAYERS = [1, 2]
CONTINUATION = 4
NOISE = 1e-4
"""Above what a sum in another order changes in a logit."""


@dataclass
class Subject:
    """A host, what is known of it, a prompt with two images and the logits that the host makes of it alone."""

    model: Any
    parts: HostParts
    inputs: dict[str, Any]
    alone: Tensor

    @property
    def interaction(self) -> str:
        """The paper's, or where tokens have no place the one that needs none."""
        geometry = self.parts.spec.geometry
        return "sela" if geometry is None or geometry.cells else "global"

    def attach(self, *, trained: bool = True) -> VisionRememberHandle:
        """Attaches blocks; those of ``trained`` change the output."""
        handle = attach_vision_remember(self.model, layers=LAYERS, spec=self.parts.spec, interaction=self.interaction)
        if trained:
            randomise(handle)
        return handle

    def logits(self, **changed: Any) -> Tensor:
        """(1, S, V) of the prompt, some of whose arguments are changed."""
        with torch.no_grad():
            logits: Tensor = self.model(**{**self.inputs, **changed}).logits
        return logits

    def image_start(self, image: int) -> int:
        """Place of the first token of one of the two images, which may be the halves of one."""
        places = (self.inputs["input_ids"][0] == self.parts.image_token_id).nonzero()[:, 0].tolist()
        starts = [place for place in places if place - 1 not in places]
        return int((starts if len(starts) > 1 else [places[0], places[len(places) // 2]])[image])


def subject(model_type: str) -> Subject:
    """A host of this type with nothing attached."""
    model = build_host(model_type)
    parts = resolve(model)
    inputs = call_inputs(model, parts)
    with torch.no_grad():
        model(**inputs)  # transformers installs hooks of its own in the first forward
        alone = model(**inputs).logits
    return Subject(model, parts, inputs, alone)


def identity_at_attach(host: Subject) -> None:
    """Nothing changes until the blocks are trained, bit by bit."""
    handle = host.attach(trained=False)
    assert torch.equal(host.logits(), host.alone)
    handle.detach()


def an_effect(host: Subject) -> None:
    """Trained blocks change the logits at the images and after them."""
    handle = host.attach()
    changed = (host.logits() - host.alone).abs().amax(-1)[0]
    handle.detach()
    assert (changed[host.image_start(0) :] > NOISE).all()


def gradients(host: Subject) -> None:
    """All parameters of the blocks learn."""
    handle = host.attach()
    host.model.train()
    host.model(**host.inputs).logits.float().pow(2).mean().backward()
    host.model.eval()
    without = [name for name, parameter in handle.module.named_parameters() if parameter.grad is None]
    handle.detach()
    host.model.zero_grad()
    assert not without


def generation(host: Subject) -> None:
    """Greedy decoding with a cache makes the logits of whole forward passes without one."""
    handle = host.attach()
    prompt = host.inputs["input_ids"]
    made = host.model.generate(
        **host.inputs,
        max_new_tokens=CONTINUATION,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=[host.parts.image_token_id],
        eos_token_id=None,
        pad_token_id=0,
    )
    for step in (0, CONTINUATION - 1):
        ids = made.sequences[:, : prompt.shape[1] + step]
        expected = host.logits(**extended(host.model, host.inputs, ids), use_cache=False)[0, -1]
        torch.testing.assert_close(made.logits[step][0], expected, rtol=1e-3, atol=1e-3)
    handle.detach()


def causality(host: Subject) -> None:
    """Another second image changes logits from there on and none before.

    A host that lets a prompt's beginning see its end is asked only whether the second image matters.
    """
    other, start = _with_another_second_image(host.inputs), host.image_start(1)
    looks_ahead = _changed(host.logits(**other), host.alone)[:start].max() > NOISE
    handle = host.attach()
    changed = _changed(host.logits(**other), host.logits())
    handle.detach()
    assert changed[start:].max() > NOISE
    assert looks_ahead or changed[:start].max() < NOISE


def save_and_load(host: Subject) -> None:
    """A saved adapter makes the same logits when loaded, and the host is not tried again."""
    with tempfile.TemporaryDirectory() as folder:
        handle = host.attach()
        expected = host.logits()
        handle.save_pretrained(folder)
        handle.detach()
        with mock.patch("vision_remember.adapters.resolve.discover", side_effect=AssertionError):
            handle = load_vision_remember(host.model, folder)
    assert torch.equal(host.logits(), expected)
    handle.detach()


def detach(host: Subject) -> None:
    """Nothing is left of us."""
    before = Fingerprint(host.model)
    handle = host.attach()
    host.logits()
    handle.detach()
    before.check(host.model)
    assert torch.equal(host.logits(), host.alone)


CHECKS: dict[str, Callable[[Subject], None]] = {
    "identity": identity_at_attach,
    "effect": an_effect,
    "gradients": gradients,
    "generation": generation,
    "causality": causality,
    "save and load": save_and_load,
    "detach": detach,
}


def _changed(logits: Tensor, than: Tensor) -> Tensor:
    """(S,), how far apart the logits of each token are."""
    return (logits - than).abs().amax(-1)[0]


def _with_another_second_image(inputs: dict[str, Any]) -> dict[str, Any]:
    """Other pixels at the end, where the second image is: of rows, of a strip, or of patches one after the other."""
    changed = {}
    for name in ("pixel_values", "pixel_values_images"):
        if name in inputs:
            changed[name] = inputs[name].clone()
            if "target_sizes" in inputs:
                changed[name][..., -changed[name].shape[-1] // 3 :] *= -1
            else:
                changed[name].view(-1)[-changed[name].numel() // 3 :] *= -1
    return changed
