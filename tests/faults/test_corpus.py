"""What fuzzing has found to reach far: none of it does any harm."""

import pytest

from scripts.faults.fuzz import TARGETS, kept, seeds


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_that_were_kept_end_nothing(target: str) -> None:
    one_input = TARGETS[target]()
    inputs = [*seeds(), *kept(target)]
    assert len(inputs) > 50
    for data in inputs:
        one_input(data)
