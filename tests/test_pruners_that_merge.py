"""SparseVLM and ToMe in whole models: tokens that take others in, inside the decoder and inside the encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import pruning_oracle as oracle
from tests import pruning_reference as reference
from tests.hosts import IMAGE_TOKEN
from tests.pruning_hosts import DECODERS, HOSTS, build, logits, prompt
from tests.test_pruners_in_hosts import CLOSE, GREEDY, STEPS
from vision_remember import attach_pruner

SPARSE: dict[str, Any] = {"layers": (0, 1), "strength": 0.6, "recycled": 0.4, "clusters": 0.3}


def sparse_row(attention: Tensor, raters: list[int], members: list[int], states: Tensor) -> tuple[list[int], Any]:
    """SparseVLM for one row: the places that stay, and the states of those that stand for clusters."""
    rows = attention[:, raters].mean(0)[:, members]
    singular = torch.linalg.svdvals(rows)
    rank = int((singular > singular.max() * max(rows.shape) * torch.finfo(torch.float32).eps).sum())
    gone = int(SPARSE["strength"] * (len(members) - rank))
    scores = attention[:, raters].double().mean((0, 1))
    stay = reference.top(scores, torch.tensor(members), len(members) - gone)
    dropped = torch.tensor([place for place in members if place not in stay])
    again = sorted(reference.top(scores, dropped, int(SPARSE["recycled"] * gone)))
    centres, nearest = reference.density_peaks(states[again], max(1, int(len(again) * SPARSE["clusters"])))
    changed = {}
    for number, centre in enumerate(centres):
        changed[again[centre]] = states[[p for p, own in zip(again, nearest, strict=True) if own == number]].mean(0)
    return [*stay, *changed], changed


def sparse(model: Any, inputs: dict[str, Any]) -> tuple[dict[int, Tensor], dict[int, oracle.Changes]]:
    """Which positions are alive from which layer on, and which states are changed."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    embeddings = oracle.run(model, inputs, {}, output_hidden_states=True).hidden_states[0]
    vision = ids == IMAGE_TOKEN
    left, alive, changed = torch.ones_like(real), {}, {}
    for layer in SPARSE["layers"]:
        model.set_attn_implementation("eager")
        out = oracle.run(model, inputs, alive, changed, output_attentions=True, output_hidden_states=True)
        model.set_attn_implementation("sdpa")
        left, changes = left.clone(), {}
        for row in range(len(ids)):
            members = (vision[row] & left[row]).nonzero()[:, 0].tolist()
            if not members:
                continue
            last = int(vision[row].nonzero()[-1])
            words = [place for place in range(last + 1, ids.shape[1]) if real[row, place]]
            raters = reference.sparse_raters(embeddings[row], vision[row].nonzero()[:, 0].tolist(), words)
            stay, own = sparse_row(out.attentions[layer][row], raters, members, out.hidden_states[layer + 1][row])
            left[row, [place for place in members if place not in stay]] = False
            changes.update({(row, place): state for place, state in own.items()})
        alive[layer + 1], changed[layer + 1] = left, changes
    return alive, changed


@pytest.mark.parametrize(("host", "decoder"), [(host, decoder) for host in HOSTS for decoder in DECODERS])
def test_sparse_vlm_equals_hiding_and_changing(host: str, decoder: str) -> None:
    model = build(host, decoder)
    inputs = prompt(model)
    alive, changed = sparse(model, inputs)
    wanted = oracle.run(model, inputs, alive, changed).logits
    tokens, steps = oracle.continued(model, inputs, alive, STEPS, changed)
    handle = attach_pruner(model, "sparse_vlm", **SPARSE)
    found = logits(model, inputs)
    here = alive[2] & inputs["attention_mask"].bool()
    torch.testing.assert_close(found[here], wanted[here], **CLOSE)
    vision = inputs["input_ids"] == IMAGE_TOKEN
    assert handle.tokens_per_layer is not None
    for layer, left in alive.items():
        assert torch.equal(handle.tokens_per_layer[layer], (left & vision).sum(1))
    out = model.generate(**inputs, **GREEDY)
    torch.testing.assert_close(torch.stack(out.logits, 1), steps, **CLOSE)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)


def merged_features(model: Any, pixels: Tensor, merges: list[int], proportional: bool) -> tuple[Tensor, Tensor]:
    """(T, n, C) what ToMe makes of the encoder's features, laid out, and (T, n) at whose place each token stands."""
    tower = model.model.vision_tower
    with torch.no_grad():
        first = tower.pre_layrnorm(tower.embeddings(pixels))
        rows, keeps = [], []
        for start in first:
            states, groups, metric = start, [[place] for place in range(len(start))], None
            for index, block in enumerate(tower.encoder.layers[: len(merges) + 1]):
                if index:
                    states, groups = reference.tome(states, metric, groups, merges[index - 1])
                    states = states.float()
                sizes = [len(group) if proportional else 1 for group in groups]
                states, metric = block_by_hand(block, states, torch.tensor(sizes).float())
            laid = torch.empty_like(start)
            for token, group in enumerate(groups):
                laid[group] = states[token]
            rows.append(laid[1:])
            # A group begins with the token that the others joined.
            keeps.append(torch.tensor([place in {group[0] for group in groups} for place in range(1, len(start))]))
    return torch.stack(rows), torch.stack(keeps)


def block_by_hand(block: Any, states: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """A block of CLIP whose attention counts each token by its size, and the mean of its keys over heads."""
    attention, normed = block.self_attn, block.layer_norm1(states)
    query, key, value = (
        getattr(attention, f"{which}_proj")(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        for which in "qkv"
    )
    weights = (query @ key.transpose(1, 2) / key.shape[-1] ** 0.5).exp() * sizes
    mixed = (weights / weights.sum(-1, keepdim=True)) @ value
    states = states + attention.out_proj(mixed.transpose(0, 1).flatten(1))
    return states + block.mlp(block.layer_norm2(states)), key.mean(0)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_tome_equals_merging_by_hand(implementation: str, proportional: bool) -> None:
    model = build("llava")
    inputs = prompt(model)
    # 64 patches become 40 in front of the fifth block, whose output the projector reads.
    features, keeps = merged_features(model, inputs["pixel_values"], [6, 6, 6, 6], proportional)
    with torch.no_grad():
        outputs = model.model.multi_modal_projector(features)
    with oracle.laid_out(model, inputs, keeps, outputs) as alive:
        wanted = oracle.run(model, inputs, alive).logits
        tokens, steps = oracle.continued(model, inputs, alive, STEPS)
    model.set_attn_implementation(implementation)
    handle = attach_pruner(model, "tome", keep=40, proportional=proportional)
    found = logits(model, inputs)
    here = alive[0] & inputs["attention_mask"].bool()
    torch.testing.assert_close(found[here], wanted[here], atol=1e-3, rtol=1e-3)
    assert handle.tokens_per_layer is not None
    assert handle.tokens_per_layer[0].tolist() == [40, 80, 0]
    out = model.generate(**inputs, **GREEDY)
    torch.testing.assert_close(torch.stack(out.logits, 1), steps, atol=1e-3, rtol=1e-3)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)


@pytest.mark.parametrize("warm", [False, True], ids=["attached first", "run before"])
def test_tome_runs_later_blocks_on_fewer_tokens(warm: bool) -> None:
    """Also where transformers put its own hooks in place before ours."""
    model = build("llava_next")
    inputs = prompt(model)
    if warm:
        logits(model, inputs)
    attach_pruner(model, "tome", keep=40)
    lengths: list[int] = []
    for block in model.model.vision_tower.encoder.layers:
        block.mlp.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    expected = logits(model, inputs)
    assert lengths == [65, 59, 53, 47, 41, 41]
    fresh = build("llava_next")
    attach_pruner(fresh, "tome", keep=40)
    assert torch.equal(logits(fresh, inputs), expected)


def test_tome_needs_a_token_for_each_patch() -> None:
    with pytest.raises(ValueError, match="an image token of InternVLForConditionalGeneration stands for several"):
        attach_pruner(build("internvl"), "tome")
