"""Rows that know their memory, and the wrapped method that makes them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from vision_remember.adapters.interception import MethodInterception
from vision_remember.adapters.transport import MemoryRows
from vision_remember.memory import Span, VisionMemory

SPANS = tuple(Span(range(4 * i, 4 * i + 4), range(i, i + 1)) for i in range(2))
MEMORY = (VisionMemory((torch.zeros(2, 4, 3),), None, (2, 2), (2, 2), SPANS),)


def rows(image: int) -> MemoryRows:
    return MemoryRows.of(MEMORY, image, torch.device("cpu"))


def test_rows_number_the_tokens_of_their_image() -> None:
    assert rows(1).flatten().tolist() == [4, 5, 6, 7]
    assert rows(1).whole_image == 1


@pytest.mark.parametrize(
    "derive",
    [
        lambda r: r[1:3],
        lambda r: torch.cat([r, rows(1)])[torch.tensor([0, 5])],
        lambda r: torch.cat([rows(0), r]),
        lambda r: r.reshape(-1, 1),
        lambda r: r.to(torch.int32),
        lambda r: r.repeat(2, 1),
        lambda r: torch.stack([r, r]).flatten(0, 1),
    ],
)
def test_what_is_made_of_rows_knows_the_memory_but_is_no_whole_image(derive: Any) -> None:
    derived = derive(rows(0))
    assert derived.memory is MEMORY
    assert derived.whole_image is None


def test_rows_are_shared_by_copies() -> None:
    original = rows(0)
    assert copy.deepcopy([original])[0] is original


class Base(nn.Module):
    def get_image_features(self, pixels: int, scale: int = 2) -> int:
        """Its own."""
        return pixels * scale


class Derived(Base):
    pass


class Handler:
    def __call__(self, base: Any, original: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        assert name == "get_image_features"
        return ("handled", original(base, *args, **kwargs))


@pytest.mark.parametrize("cls", [Base, Derived])
def test_the_method_is_wrapped_for_the_added_instances_and_put_back_after_the_last(cls: type[Base]) -> None:
    own = Base.__dict__["get_image_features"]
    interception = MethodInterception("_slot", ["get_image_features", "get_video_features"])
    first, second, other = cls(), cls(), cls()
    for module in (first, second):
        interception.add(module)
        module._slot = Handler()
    assert first.get_image_features(3, scale=4) == ("handled", 12)
    assert other.get_image_features(3) == 6
    assert interception.original(first, "get_image_features")(first, 5) == 10
    assert list(inspect.signature(first.get_image_features).parameters) == ["pixels", "scale"]
    assert first.get_image_features.__doc__ == "Its own."

    interception.release(first)
    assert second.get_image_features(1) == ("handled", 2)
    interception.release(second)
    interception.release(second)  # once more changes nothing
    assert cls.get_image_features is own
    assert Base.__dict__["get_image_features"] is own
    assert "get_image_features" not in Derived.__dict__
