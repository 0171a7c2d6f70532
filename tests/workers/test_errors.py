"""One line for what went wrong."""

import pytest
import torch

from workers.errors import cause_of


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
        MemoryError(),
        torch.OutOfMemoryError("x"),
    ],
)
def test_what_comes_of_too_little_memory_says_so(error: Exception) -> None:
    assert "memory" in cause_of(error)
    assert "would help" in cause_of(error)


def test_other_causes_are_named_down_to_the_first() -> None:
    error = ValueError("second\nline")
    error.__cause__ = KeyError("first")
    assert cause_of(error) == "ValueError: second; because of KeyError: 'first'"
