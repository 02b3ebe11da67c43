"""Which position is which vision token: gather, scatter, and the memory that is recalled between them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vision_remember import VisionRemember
from vision_remember.layout import VisionLayout
from vision_remember.memory import Recall, Tiles, VisionMemory, memories, spans

B, S, D = 2, 11, 5
TILES, GRID = 3, (2, 2)

# Sequences hold tile 0 and tile 2 (first row) and tile 1 (second row); a newline stands inside tile 2.
WHOLE = VisionLayout(
    positions=torch.tensor([1, 2, 3, 4, 6, 7, 9, 10, S + 3, S + 4, S + 5, S + 6]),
    slots=torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7]),
    tiles=TILES,
    token_grid=GRID,
)
# All tokens, in order.
PLAIN = VisionLayout(
    positions=torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, S + 2, S + 3, S + 4, S + 5]),
    slots=None,
    tiles=TILES,
    token_grid=GRID,
)
# The second half of tile 0 and the first of tile 2, as a chunk of a prefill may hold.
PART = VisionLayout(
    positions=torch.tensor([0, 1, S + 8, S + 9]), slots=torch.tensor([2, 3, 8, 9]), tiles=TILES, token_grid=GRID
)
NONE = VisionLayout(
    positions=torch.empty(0, dtype=torch.long),
    slots=torch.empty(0, dtype=torch.long),
    tiles=TILES,
    token_grid=GRID,
)
# The first row of tile 1 with its newline; 12 marks what is no vision token.
SPARE = VisionLayout(
    positions=torch.tensor([2, 3, 4, S + 1]), slots=torch.tensor([4, 5, 12, 12]), tiles=TILES, token_grid=GRID
)
every_layout = pytest.mark.parametrize(
    "layout", [WHOLE, PLAIN, PART, NONE, SPARE], ids=["whole", "plain", "part", "none", "spare"]
)


def hidden() -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(0))


def places(layout: VisionLayout) -> list[tuple[int, int, int, int]]:
    """(sequence, position, tile, token) of each vision token."""
    positions = layout.positions.tolist()
    slots = range(len(positions)) if layout.slots is None else layout.slots.tolist()
    held = [(p, slot) for p, slot in zip(positions, slots, strict=True) if slot < TILES * 4]
    return [(*divmod(position, S), *divmod(slot, 4)) for position, slot in held]


@every_layout
def test_gather_brings_each_position_to_its_token_and_leaves_others_zero(layout: VisionLayout) -> None:
    expected = torch.zeros(TILES, 4, D)
    for sequence, position, tile, token in places(layout):
        expected[tile, token] = hidden()[sequence, position]
    assert torch.equal(layout.gather(hidden()), expected)


@every_layout
def test_scatter_writes_each_token_to_its_position_and_nothing_else(layout: VisionLayout) -> None:
    given = hidden()
    tokens = torch.randn(TILES, 4, D, generator=torch.Generator().manual_seed(1))
    expected = hidden()
    for sequence, position, tile, token in places(layout):
        expected[sequence, position] = tokens[tile, token]
    assert torch.equal(layout.scatter(given, tokens), expected)
    assert torch.equal(given, hidden()), "the hidden states given must stay as they are"


@every_layout
def test_scatter_undoes_gather(layout: VisionLayout) -> None:
    assert torch.equal(layout.scatter(hidden(), layout.gather(hidden())), hidden())


@every_layout
def test_gradients_go_through_tokens_at_vision_positions_and_past_them_elsewhere(layout: VisionLayout) -> None:
    given = hidden().requires_grad_()
    layout.scatter(given, 3 * layout.gather(given)).sum().backward()
    expected = torch.ones(B, S, D)
    for sequence, position, _, _ in places(layout):
        expected[sequence, position] = 3
    assert torch.equal(given.grad, expected)


@every_layout
def test_views_and_half_precision_are_welcome(layout: VisionLayout) -> None:
    view = hidden().bfloat16().transpose(0, 1).contiguous().transpose(0, 1)
    assert not view.is_contiguous()
    output = layout.scatter(view, 2 * layout.gather(view))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, layout.scatter(view.contiguous(), 2 * layout.gather(view.contiguous())))


@settings(deadline=None, derandomize=True)
@given(data=st.data())
def test_any_layout_gathers_and_scatters_what_it_says(data: st.DataObject) -> None:
    sizes = {"sequences": 3, "length": 9, "tiles": 3, "rows": 3, "columns": 3}
    B, S, T, h, w = (data.draw(st.integers(1, most), label=name) for name, most in sizes.items())
    count = T * h * w
    chosen = data.draw(st.lists(st.integers(0, B * S - 1), unique=True, max_size=count), label="positions")
    slots = data.draw(st.permutations(range(count)), label="slots")[: len(chosen)]
    spare = data.draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)), label="spare")
    slots = [count if without else slot for slot, without in zip(slots, spare, strict=True)]
    layout = VisionLayout(torch.tensor(sorted(chosen)).long(), torch.tensor(slots).long(), T, (h, w))
    hidden, tokens = torch.randn(B, S, D), torch.randn(T, h * w, D)
    gathered, scattered = torch.zeros(count, D), hidden.clone().flatten(0, 1)
    for position, slot in zip(sorted(chosen), slots, strict=True):
        if slot < count:
            gathered[slot] = hidden.flatten(0, 1)[position]
            scattered[position] = tokens.flatten(0, 1)[slot]
    assert torch.equal(layout.gather(hidden), gathered.view(T, h * w, D))
    assert torch.equal(layout.scatter(hidden, tokens), scattered.view(B, S, D))


@pytest.mark.parametrize("layout", [WHOLE, PART], ids=["whole", "part"])
def test_compiles_without_graph_breaks(layout: VisionLayout) -> None:
    def double(x: Tensor) -> Tensor:
        return layout.scatter(x, 2 * layout.gather(x))

    torch.compiler.reset()
    assert torch.equal(torch.compile(double, fullgraph=True, backend="eager")(hidden()), double(hidden()))


# Two tiles with newlines between them, one tile that a newline follows, one tile of whose tokens one was cut away.
IMAGES = spans(tokens=(10, 5, 3), tiles=(2, 1, 1))
SLOTS = torch.tensor([0, 1, -1, 2, 3, -1, 4, 5, 6, 7, 8, 9, 10, 11, -1, 12, 13, 15])


def memory(*, packed: bool = False, saliency: bool = True) -> VisionMemory:
    """Four tiles: of the images above, or one image each."""
    generator = torch.Generator().manual_seed(2)
    return VisionMemory(
        levels=(torch.randn(4, 4, D, generator=generator),),
        saliency=torch.rand(4, 4, generator=generator) if saliency else None,
        feature_grid=GRID,
        token_grid=GRID,
        spans=IMAGES if packed else spans(tokens=(4,) * 4, tiles=(1,) * 4),
        slots=SLOTS if packed else None,
    )


def add_features(tokens: Any, features: Any, *, saliency: Any, **_: Any) -> Any:
    """A block by whose update a token tells its tile and its place in it."""
    if isinstance(tokens, list):
        return [add_features(*row, saliency=own) for *row, own in zip(tokens, features, saliency, strict=True)]
    return tokens + (features if saliency is None else features * saliency[..., None])


def recalled_by_hand(stored: VisionMemory, rows: list[int], placeholders: Tensor, states: Tensor) -> Tensor:
    """``states`` after :func:`add_features`; the i-th placeholder holds the image token ``rows[i]``."""
    slots = range(len(stored.levels[0]) * 4) if stored.slots is None else stored.slots.tolist()
    update = add_features(torch.zeros(()), stored.levels[0], saliency=stored.saliency).flatten(0, 1)
    expected = states.clone()
    for row, (sequence, position) in zip(rows, placeholders.nonzero().tolist(), strict=True):
        if slots[row] >= 0:
            expected[sequence, position] += update[slots[row]]
    return expected


def holders(count: int) -> Tensor:
    """(2, 16), room for ``count`` image tokens between other tokens."""
    chosen = torch.randperm(32, generator=torch.Generator().manual_seed(count))[:count]
    return torch.zeros(32, dtype=torch.bool).index_fill(0, chosen, True).unflatten(0, (2, 16))


def states() -> Tensor:
    return torch.randn(2, 16, D, generator=torch.Generator().manual_seed(3))


def test_spans_follow_one_another() -> None:
    assert [(list(span.rows), list(span.tiles)) for span in spans(tokens=(2, 0, 3), tiles=(1, 0, 2))] == [
        ([0, 1], [0]),
        ([], []),
        ([2, 3, 4], [1, 2]),
    ]


@pytest.mark.parametrize("saliency", [True, False], ids=["saliency", "no saliency"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("images", [[0, 1, 2], [2], [1, 0], [1, 2, 1], [0, 0]], ids=str)
def test_whole_images_are_recalled_where_their_placeholders_are(
    images: list[int], packed: bool, saliency: bool
) -> None:
    stored = memory(packed=packed, saliency=saliency)
    rows = [row for image in images for row in stored.spans[image].rows]
    recalled = stored.recall_images(images, holders(len(rows))).through(add_features, states())
    torch.testing.assert_close(recalled, recalled_by_hand(stored, rows, holders(len(rows)), states()))


@pytest.mark.parametrize(
    "packed",
    [True, False],
    ids=["packed", "plain"],
)
def test_no_images_are_recalled_as_nothing(packed: bool) -> None:
    recall = memory(packed=packed).recall_images([], torch.zeros(2, 16, dtype=torch.bool))
    assert torch.equal(recall.through(add_features, states()), states())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [12, 14, 15], [7, 2], [5], []], ids=str)
def test_any_image_tokens_are_recalled_where_their_placeholders_are(rows: list[int], packed: bool) -> None:
    stored = memory(packed=packed)
    tensor = torch.tensor(rows, dtype=torch.long)
    recalled = stored.recall_rows(tensor, holders(len(rows))).through(add_features, states())
    torch.testing.assert_close(recalled, recalled_by_hand(stored, rows, holders(len(rows)), states()))


def test_beams_may_hold_the_same_image_tokens() -> None:
    placeholders = torch.zeros(2, 16, dtype=torch.bool)
    placeholders[:, 3:8] = True
    rows = [4, 5, 6, 7, 8] * 2
    recalled = memory(packed=True).recall_rows(torch.tensor(rows), placeholders).through(add_features, states())
    expected = recalled_by_hand(memory(packed=True), rows, placeholders, states())
    torch.testing.assert_close(recalled, expected)


def of_several_sizes(slots: Tensor | None) -> tuple[VisionMemory, ...]:
    """Two images of 2x2 and one of 1x2 tiles, the second image of both sizes."""
    generator = torch.Generator().manual_seed(5)
    large = Tiles((0, 2), (torch.randn(2, 4, D, generator=generator),), None, (2, 2), (2, 2))
    small = Tiles((1, 3), (torch.randn(2, 2, D, generator=generator),), None, (1, 2), (1, 2))
    return memories([large, small], spans(tokens=(4, 6, 2) if slots is None else (5, 6, 2), tiles=(1, 2, 1)), slots)


@pytest.mark.parametrize("whole", [True, False], ids=["whole images", "parts"])
@pytest.mark.parametrize("images", [[0, 1, 2], [1], [2, 0], [1, 2, 1]], ids=str)
@pytest.mark.parametrize(
    "slots", [None, torch.tensor([0, 1, 2, 3, -1, 4, 5, 6, 7, 8, 9, 10, 11])], ids=["plain", "own"]
)
def test_tiles_of_several_sizes_are_recalled_together(slots: Tensor | None, images: list[int], whole: bool) -> None:
    stored = of_several_sizes(slots)
    large, small = (memory.levels[0] for memory in stored)
    # The tokens of all tiles in order: 2x2, 1x2, 2x2, 1x2.
    update = torch.cat([large[0], small[0], large[1], small[1], torch.zeros(1, D)])
    if not whole:
        images = list(dict.fromkeys(images))  # a sequence holds no part of an image twice
    rows = [row for image in images for row in stored[0].spans[image].rows]
    places = holders(len(rows))
    recalls = [m.recall_images(images, places) if whole else m.recall_rows(torch.tensor(rows), places) for m in stored]
    recalled = Recall.joined(recalls).through(add_features, states())
    expected = states()
    own = torch.arange(12) if slots is None else slots
    for row, (sequence, position) in zip(rows, places.nonzero().tolist(), strict=True):
        expected[sequence, position] += update[own[row]]
    torch.testing.assert_close(recalled, expected)


def test_recalling_nothing_changes_nothing_but_the_blocks_parameters_take_part() -> None:
    block = VisionRemember(D, 6, zero_init=False, num_heads=1)
    given = states().requires_grad_()
    recalled = VisionMemory.nothing([6], given).through(block, given)
    assert torch.equal(recalled, given)
    recalled.sum().backward()
    assert not [name for name, parameter in block.named_parameters() if parameter.grad is None]


def test_several_streams_of_hidden_states_are_an_error() -> None:
    """As the decoder of Gemma 3n hands them on."""
    streams = torch.zeros(4, B, S, D)
    with pytest.raises(ValueError, match=r"hidden states have shape \(4, 2, 11, 5\), expected \(B, S, D\)"):
        memory().recall_images([], torch.zeros(B, S, dtype=torch.bool)).through(add_features, streams)


@pytest.mark.parametrize("data", [WHOLE, memory(), IMAGES[0]], ids=lambda data: type(data).__name__)
def test_what_a_call_carries_is_frozen(data: Any) -> None:
    for field in dataclasses.fields(data):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(data, field.name, None)
