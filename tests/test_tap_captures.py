"""When a tap listens, and to whom: hooks, nesting, threads, copies."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.encoders import build, captured, hooks, images
from vision_remember import MultiLevelTap


def test_hooks_are_there_during_capture_only() -> None:
    encoder = build()
    encoder(images(), output_hidden_states=True)  # Hugging Face leaves hooks of its own
    before, keys = hooks(encoder), set(encoder.state_dict())
    tap = MultiLevelTap(encoder, (0, 2, 4))
    assert hooks(encoder) == before, "a tap at rest leaves the encoder alone"
    with tap.capture():
        assert hooks(encoder) > before
        assert set(encoder.state_dict()) == keys
    assert hooks(encoder) == before


def test_an_exception_inside_the_encoder_leaves_nothing_behind() -> None:
    encoder = build()
    before = hooks(encoder)
    tap = MultiLevelTap(encoder, (2, 4))
    with pytest.raises(ValueError, match="image size"), tap.capture():
        encoder(images(size=(20, 28)))
    assert hooks(encoder) == before
    with tap.capture() as result:
        encoder(images())
    assert torch.equal(result.joined(), captured(encoder, images()).joined())


@pytest.mark.parametrize("read", [lambda c: c.levels, lambda c: c.grid, lambda c: c.joined()])
def test_nothing_captured_is_an_error_that_says_what_to_do(read: Callable[[Any], Any]) -> None:
    with MultiLevelTap(build(), (2, 4)).capture() as result:
        assert result.saliency is None
        with pytest.raises(RuntimeError, match=r"run the encoder inside capture\(\)"):
            read(result)


def test_the_last_run_of_a_capture_counts() -> None:
    encoder = build()
    with MultiLevelTap(encoder, (2, 4)).capture() as result:
        encoder(images(1, size=(20, 36)), interpolate_pos_encoding=True)
        encoder(images(2))
    expected = captured(encoder, images(2))
    assert result.grid == expected.grid
    assert torch.equal(result.joined(), expected.joined())
    assert torch.equal(result.saliency, expected.saliency)


def test_a_tap_can_be_used_again_and_forgets_nothing_that_was_captured() -> None:
    encoder = build()
    tap = MultiLevelTap(encoder, (2, 4))
    results = []
    for seed in (1, 2):
        with tap.capture() as result:
            encoder(images(seed))
        results.append(result)
    for seed, result in zip((1, 2), results, strict=True):
        assert torch.equal(result.joined(), captured(encoder, images(seed)).joined())


@pytest.mark.parametrize("same_tap", [True, False], ids=["one tap", "two taps"])
def test_nested_captures(same_tap: bool) -> None:
    """Of one tap the innermost sees a run; taps of their own do not know of each other."""
    encoder = build()
    outer_tap = MultiLevelTap(encoder, (2, 4))
    inner_tap = outer_tap if same_tap else MultiLevelTap(encoder, (1,), saliency="received")
    before = hooks(encoder)
    with outer_tap.capture() as outer:
        encoder(images(1))
        with inner_tap.capture() as inner:
            encoder(images(2))
        inside = hooks(encoder)
    assert before == hooks(encoder) < inside
    assert torch.equal(outer.joined(), captured(encoder, images(1 if same_tap else 2)).joined())
    expected = captured(encoder, images(2), levels=inner_tap.levels, saliency=inner_tap.saliency)
    assert torch.equal(inner.joined(), expected.joined())
    assert torch.equal(inner.saliency, expected.saliency)


def test_a_nested_capture_that_fails_gives_way_to_the_outer_one() -> None:
    encoder = build()
    tap = MultiLevelTap(encoder, (2, 4))
    with tap.capture() as outer:
        with pytest.raises(ValueError, match="image size"), tap.capture():
            encoder(images(size=(20, 28)))
        encoder(images())
    assert torch.equal(outer.joined(), captured(encoder, images()).joined())


def test_threads_at_once_see_their_own_runs() -> None:
    encoder, count = build(), 4
    tap = MultiLevelTap(encoder, (0, 2, 4))
    before = hooks(encoder)
    barrier = threading.Barrier(count)
    results: dict[int, Any] = {}

    def work(seed: int) -> None:
        for _ in range(5):
            with tap.capture() as result:
                barrier.wait(timeout=60)  # all are inside
                encoder(images(seed))
                barrier.wait(timeout=60)
            results[seed] = result

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(results) == count
    for seed, result in results.items():
        expected = captured(encoder, images(seed), levels=(0, 2, 4))
        assert torch.equal(result.joined(), expected.joined())
        assert torch.equal(result.saliency, expected.saliency)
    assert hooks(encoder) == before


def test_a_run_outside_any_capture_is_not_seen() -> None:
    """The hooks are there while another thread captures."""
    encoder = build()
    tap = MultiLevelTap(encoder, (2, 4))
    with tap.capture() as result:
        other = threading.Thread(target=encoder, args=(images(),))
        other.start()
        other.join()
    with pytest.raises(RuntimeError, match="not captured"):
        _ = result.levels


def test_an_installed_tap_records_until_removed() -> None:
    encoder = build()
    before = hooks(encoder)
    tap = MultiLevelTap(encoder, (2, 4))
    tap.install()
    installed = hooks(encoder)
    with tap.record() as result:
        encoder(images())
    assert torch.equal(result.joined(), captured(encoder, images()).joined())
    with tap.capture():
        assert hooks(encoder) == installed, "no hook twice"
    assert hooks(encoder) == installed
    tap.remove()
    tap.remove()
    assert hooks(encoder) == before


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda tap: pickle.loads(pickle.dumps(tap))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("installed", [False, True], ids=["at rest", "installed"])
def test_a_copied_tap_taps_a_copied_encoder(copied: Callable[[Any], Any], installed: bool) -> None:
    encoder = build()
    tap = MultiLevelTap(encoder, (0, 2), saliency="received")
    if installed:
        tap.install()
    other = copied(tap)
    assert other.encoder is not encoder
    with other.capture() as mine, tap.capture() as theirs:
        other.encoder(images(2))
        encoder(images(1))
    for result, seed in ((theirs, 1), (mine, 2)):
        expected = captured(encoder, images(seed), levels=(0, 2), saliency="received")
        assert torch.equal(result.joined(), expected.joined())
        assert torch.equal(result.saliency, expected.saliency)
    other.remove()
    assert hooks(other.encoder) == 0
