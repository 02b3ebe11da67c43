"""The pruners as functions of tensors: each against a loop in float64, and the errors of their options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import pruning_reference as reference
from vision_remember import PRUNERS
from vision_remember.pruning import (
    DecoderPruner,
    EncoderPruner,
    Evidence,
    FasterVLM,
    FastV,
    PruMerge,
    PruMergePlus,
    PyramidDrop,
    Random,
    SparseVLM,
    Tokens,
    ToMe,
    Uniform,
    VisionZip,
    build_pruner,
)
from vision_remember.pruning.prumerge import outliers
from vision_remember.pruning.sparse_vlm import density_clusters
from vision_remember.pruning.tome import Merged, merge

GRIDS = [(4, 6), (7, 7), (5, 3)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def evidence(grid: tuple[int, int], dtype: torch.dtype = torch.float32, tiles: int = 3) -> Evidence:
    count = grid[0] * grid[1]
    # Peaked, so that there are outliers; a tile without any comes last.
    attention = (torch.randn(tiles, count) * 2).softmax(-1)
    attention[-1] = torch.linspace(1, 2, count) / count
    return Evidence(attention, torch.randn(tiles, count, 2, 5), torch.randn(tiles, count, 8).to(dtype), grid)


def tokens(*, queries: int = 1, seed: int = 0) -> Tokens:
    """Three rows: vision tokens in two groups, in one, and none; of several queries the last row counts two."""
    torch.manual_seed(seed)
    vision = torch.zeros(3, 30, dtype=torch.bool)
    vision[0, 2:12] = vision[0, 15:25] = vision[1, 8:21] = True
    counted = torch.ones(3, queries, dtype=torch.bool)
    counted[2, 2:] = False
    attention = (torch.randn(3, 4, queries, 30) * 2).softmax(-1)
    return Tokens(torch.randn(3, 30, 6), vision, vision.sum(1), attention, counted)


def places(members: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in members]


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.77, 1.0])
def test_fastv_keeps_what_the_last_token_looks_at(keep: float) -> None:
    given = tokens()
    kept = FastV(keep=keep).choose(0, given)
    assert given.attention is not None
    for row, found in enumerate(places(kept.vision)):
        members = given.vision[row].nonzero()[:, 0]
        count = max(1, round(keep * len(members))) if len(members) else 0
        assert found == sorted(reference.top(given.attention[row, :, 0].double().mean(0), members, count))
    assert torch.equal(kept.hidden, given.hidden)


def test_pyramid_drop_counts_from_the_first_number_of_tokens() -> None:
    pruner, given = PyramidDrop(), tokens()
    sizes = []
    for stage in range(3):
        kept = pruner.choose(stage, given)
        sizes.append(kept.vision.sum(1).tolist())
        assert not (kept.vision & ~given.vision).any()
        given = Tokens(given.hidden, kept.vision, given.initial, given.attention, given.counted)
    assert sizes == [[10, 6, 0], [5, 3, 0], [2, 2, 0]]


def test_stages_follow_the_depth() -> None:
    assert [stage.layer for stage in PyramidDrop().stages(32)] == [8, 16, 24]
    assert [stage.layer for stage in PyramidDrop().stages(28)] == [7, 14, 21]
    assert [stage.layer for stage in SparseVLM().stages(32)] == [3, 7, 16]
    assert [(stage.layer, stage.attention_of) for stage in FastV().stages(32)] == [(2, 1)]


def test_of_equal_scores_the_first_token_stays() -> None:
    given = tokens()
    assert given.attention is not None
    level = Tokens(given.hidden, given.vision, given.initial, torch.ones_like(given.attention), given.counted)
    assert places(FastV(keep=0.3).choose(0, level).vision) == [[2, 3, 4, 5, 6, 7], [8, 9, 10, 11], []]


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_uniform_takes_even_steps(keep: float) -> None:
    given = tokens()
    for row, found in zip(given.vision, places(Uniform(keep=keep).choose(0, given).vision), strict=True):
        members = row.nonzero()[:, 0].tolist()
        count = max(1, round(keep * len(members))) if members else 0
        assert found == [members[-(-place * len(members) // count)] for place in range(count)]


def test_random_depends_on_its_seed_and_not_on_the_batch() -> None:
    given = tokens()
    first, other = (Random(keep=0.4, seed=seed).choose(0, given).vision for seed in (0, 1))
    assert first.sum(1).tolist() == [8, 5, 0]
    assert not torch.equal(first, other)
    alone = Tokens(given.hidden[1:2], given.vision[1:2], given.initial[1:2])
    assert torch.equal(Random(keep=0.4).choose(0, alone).vision[0], first[1])


SELECTIONS: dict[str, tuple[EncoderPruner, Any]] = {
    "faster_vlm": (
        FasterVLM(keep=4),
        lambda scores, keys, features: (reference.top(scores, torch.arange(len(scores)), 4), {}),
    ),
    "vision_zip": (VisionZip(dominant=3, contextual=4), reference.vision_zip(3, 4)),
    "prumerge": (PruMerge(neighbours=5), reference.prumerge(5, spread=False)),
    "prumerge_plus": (PruMergePlus(neighbours=5), reference.prumerge(5, spread=True)),
}


@every_dtype
@every_grid
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_choice_in_the_encoder_equals_its_loop(name: str, grid: tuple[int, int], dtype: torch.dtype) -> None:
    given = evidence(grid, dtype)
    pruner, select = SELECTIONS[name]
    found = pruner.select(given)
    assert found.features.dtype == dtype
    for tile in range(len(given.attention)):
        stay, changed = select(given.attention[tile], given.keys[tile], given.features[tile])
        assert places(found.keep)[tile] == sorted(stay)
        wanted = given.features[tile].double()
        for place, value in changed.items():
            wanted[place] = value
        close = {"atol": 0.1, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(found.features[tile][stay].double(), wanted[stay], **close)


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_choice_in_the_encoder_works_under_autocast(name: str) -> None:
    given, (pruner, _) = evidence((7, 7)), SELECTIONS[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pruner.select(given)
    plain = pruner.select(given)
    assert found.features.dtype == plain.features.dtype
    if name != "vision_zip":  # whose targets stay the same, but by likeness alone others may join them
        torch.testing.assert_close(found.features, plain.features, atol=0.1, rtol=0.02)
    assert torch.equal(found.keep, plain.keep)


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "tome"])
def test_options_are_the_fields(name: str) -> None:
    pruner = build_pruner(name)
    assert build_pruner(name, **pruner.options()) == pruner
    assert isinstance(pruner, (DecoderPruner, EncoderPruner))
    assert pruner.source


def test_merging_takes_gradients() -> None:
    given = evidence((3, 4))
    for pruner in (VisionZip(dominant=3, contextual=2), PruMergePlus(neighbours=2)):

        def merged(features: Tensor, pruner: EncoderPruner = pruner) -> Tensor:
            return pruner.select(Evidence(given.attention.double(), given.keys.double(), features, (3, 4))).features

        assert torch.autograd.gradcheck(merged, (given.features.double().requires_grad_(),))


def test_raters_are_the_words_that_stand_out() -> None:
    torch.manual_seed(1)
    given = tokens()
    embeddings, real = torch.randn(3, 30, 6), torch.ones(3, 30, dtype=torch.bool)
    real[1, :4] = False
    found = places(SparseVLM().queries(embeddings, given.vision, real))
    for row, first in ((0, 25), (1, 21)):
        vision = given.vision[row].nonzero()[:, 0].tolist()
        assert found[row] == reference.sparse_raters(embeddings[row], vision, list(range(first, 30)))
    assert found[2] == [29]  # no image: the last token, whose rating nobody asks for


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_sparse_vlm_drops_by_rank_and_recycles(strength: float) -> None:
    given = tokens(queries=3)
    assert given.attention is not None
    kept = SparseVLM(strength=strength, recycled=0.5, clusters=0.4).choose(0, given)
    for row in range(2):
        members = given.vision[row].nonzero()[:, 0]
        scores = given.attention[row].double().mean((0, 1))
        rank = int(torch.linalg.matrix_rank(given.attention[row].mean(0)[:, members]))
        assert rank == 3
        gone = int(strength * (len(members) - rank))
        stay = reference.top(scores, members, len(members) - gone)
        dropped = torch.tensor([int(place) for place in members if int(place) not in stay])
        again = sorted(reference.top(scores, dropped, int(0.5 * gone)))
        states = given.hidden[row, again]
        centres, nearest = reference.density_peaks(states, max(1, int(len(again) * 0.4)))
        assert places(kept.vision)[row] == sorted([*stay, *(again[centre] for centre in centres)])
        for number, centre in enumerate(centres):
            wanted = states[[number == own for own in nearest]].double().mean(0)
            torch.testing.assert_close(kept.hidden[row, again[centre]].double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kept.hidden[row, stay], given.hidden[row, stay])
    assert not kept.vision[2].any()


@pytest.mark.parametrize("count", [1, 3, 9])
def test_density_clusters_equal_their_loop(count: int) -> None:
    states = torch.randn(9, 4)
    centres, nearest = density_clusters(states, count)
    assert (centres.tolist(), nearest.tolist()) == reference.density_peaks(states, count)


@pytest.mark.parametrize(("count", "size"), [(1, 10), (4, 10), (3, 7)])
def test_merging_equals_its_loop(count: int, size: int) -> None:
    hidden, before = torch.randn(2, size, 6), Merged.nothing(2, size, torch.device("cpu"))
    groups = [[[place] for place in range(size)]] * 2
    wanted = hidden
    for _ in range(2):
        metric = torch.randn(2, hidden.shape[1], 3)
        number = min(count, (hidden.shape[1] - 1) // 2)
        hidden, before = merge(hidden, metric, before, number, prefix=1)
        rows = [reference.tome(wanted[tile], metric[tile], groups[tile], number) for tile in range(2)]
        wanted, groups = torch.stack([row[0] for row in rows]), [row[1] for row in rows]
        torch.testing.assert_close(hidden.double(), wanted, atol=1e-5, rtol=1e-5)
    for tile in range(2):
        assert before.sizes[tile].tolist() == [len(group) for group in groups[tile]]
        for token, group in enumerate(groups[tile]):
            assert {int(before.source[tile, place]) for place in group} == {token}
            assert int(before.places[tile, token]) in group
    assert torch.equal(before.unmerged(hidden)[0, groups[0][1][0]], hidden[0, 1])


def test_tome_spreads_its_merges_over_the_blocks() -> None:
    assert ToMe(keep=0.5).merges(64, 5) == [8, 8, 8, 8]
    assert ToMe(keep=20).merges(64, 4) == [15, 15, 14]
    assert ToMe(keep=64).merges(64, 1) == []
    with pytest.raises(ValueError, match="no more than half of those that are left can be merged at once"):
        ToMe(keep=4).merges(64, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_attention_of_any_precision_decides(dtype: torch.dtype) -> None:
    given = tokens(queries=3)
    assert given.attention is not None
    given = dataclasses.replace(given, hidden=given.hidden.to(dtype), attention=given.attention.to(dtype))
    for pruner in (FastV(), PyramidDrop(), SparseVLM()):
        kept = pruner.choose(0, given)
        assert kept.hidden.dtype == dtype
        assert 0 < kept.vision.sum() < given.vision.sum()


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("fastv", {"keep": 0}, "keep=0: expected the share of vision tokens that stay"),
    ("fastv", {"keep": 1.2}, r"keep=1\.2: expected the share"),
    ("fastv", {"ratio": 0.5}, "has no option 'ratio'"),
    ("pyramid_drop", {"keep": (0.5, 0.6)}, "expected shares that fall"),
    ("pyramid_drop", {"keep": 0.5}, r"keep=0\.5: expected several, one for each stage"),
    ("pyramid_drop", {"layers": 3}, "layers=3: expected several"),
    ("pyramid_drop", {"layers": (1, 2)}, "expected a share for each layer"),
    ("faster_vlm", {"keep": 0}, "keep=0: expected a share of a tile's tokens between 0 and 1, or their number"),
    ("vision_zip", {"contextual": -1}, "contextual=-1"),
    ("prumerge", {"neighbours": -2}, "neighbours=-2: expected a whole number, 0 or more"),
    ("prumerge", {"neighbours": 2.5}, r"neighbours=2\.5: expected a whole number, 0 or more"),
    ("random", {"seed": "a"}, "seed='a': expected a whole number"),
    ("sparse_vlm", {"layers": 3}, "layers=3: expected several"),
    ("sparse_vlm", {"recycled": "a"}, "recycled='a': expected a share of the dropped tokens"),
    ("sparse_vlm", {"strength": 0}, r"strength=0: expected how much of \(tokens - rank\) is dropped, above 0 and up"),
    ("sparse_vlm", {"clusters": 2}, "clusters=2: expected the number of clusters for each recycled token, above 0"),
    ("sparse_vlm", {"recycled": 1.0}, r"recycled=1\.0: expected a share of the dropped tokens"),
    ("tome", {"keep": 1.5}, r"keep=1\.5"),
    ("fast_v", {}, "did you mean 'fastv'"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=[f"{name} {options}" for name, options, _ in BAD])
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_pruner(name, **options)


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (FastV(layer=0), r"layer=\[0\]: expected rising layers from 1 to 3"),
        (FastV(layer=4), r"layer=\[4\]"),
        (FastV(layer=1.5), r"layer=\[1\.5\]"),  # type: ignore[arg-type]
        (PyramidDrop(layers=(1, "2", 3)), r"layers=\[1, '2', 3\]"),  # type: ignore[arg-type]
        (PyramidDrop(layers=(3, 2, 1)), r"layers=\[3, 2, 1\]: expected rising"),
        (Uniform(layer=-1), "from 0 to 3"),
        (SparseVLM(layers=(3,)), "from 0 to 2"),
    ],
)
def test_layers_that_the_decoder_lacks_are_named(pruner: DecoderPruner, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner.stages(4)


def test_tokens_that_a_tile_lacks_are_named() -> None:
    with pytest.raises(ValueError, match="dominant=54, contextual=10: 64 tokens, but a tile of this host has 60"):
        VisionZip().check(60)
    with pytest.raises(ValueError, match=r"contextual=0\.5: 86 tokens, but .* has 60; give less of either"):
        VisionZip(dominant=0.93, contextual=0.5).check(60)
    with pytest.raises(ValueError, match="keep=70: a tile of this host has 64 tokens"):
        FasterVLM(keep=70).check(64)


def test_a_tile_without_outliers_keeps_a_token() -> None:
    given = evidence((4, 6))
    assert outliers(given.attention)[-1] == 0
    assert PruMerge().select(given).keep[-1].sum() == 2  # the most attended, and the sum of the others
