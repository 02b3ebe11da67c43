"""The one kind of table."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import pytest

from vision_remember.registry import Registry, did_you_mean

FRUITS: Registry[int] = Registry("fruit", {"apple": 1, "pear": 2})


def test_it_is_a_mapping_in_the_order_given() -> None:
    assert isinstance(FRUITS, Mapping)
    assert dict(FRUITS) == {"apple": 1, "pear": 2}
    assert list(FRUITS) == ["apple", "pear"]
    assert "apple" in FRUITS
    assert "plum" not in FRUITS
    assert len(FRUITS) == 2


def test_it_cannot_be_written_to_from_outside() -> None:
    entries = {"apple": 1}
    table = Registry("fruit", entries)
    entries["pear"] = 2
    assert list(table) == ["apple"]
    with pytest.raises(TypeError):
        table["plum"] = 3  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("aple", "unknown fruit 'aple': did you mean 'apple'? known: 'apple', 'pear'"),
        ("xyz", "unknown fruit 'xyz': known: 'apple', 'pear'"),
    ],
)
def test_an_unknown_name_is_an_error_with_a_suggestion(name: str, message: str) -> None:
    with pytest.raises(ValueError, match="unknown fruit") as error:
        FRUITS[name]
    assert str(error.value) == message


def test_suggestions_take_lists_too() -> None:
    assert did_you_mean("wndow", ["window", "cells"]) == "did you mean 'window'? known: 'cells', 'window'"


def test_it_pickles() -> None:
    assert dict(pickle.loads(pickle.dumps(FRUITS))) == dict(FRUITS)


def test_get_returns_the_default_for_an_unknown_name() -> None:
    assert FRUITS.get("plum", 0) == 0
