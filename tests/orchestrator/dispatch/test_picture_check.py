"""Pictures as a job's, or not."""

import pytest

from orchestrator.dispatch.picture_check import fault_of_all, fault_of_last_part, fault_of_part
from protocol.pictures import PART_BYTES
from protocol.tensors import Tensor
from tests.protocol.test_recipe import recipe

PICTURES = recipe(width=64, height=64, num_images=4)
VIDEO = recipe(width=64, height=64, num_images=2).model_copy(update={"frames": 5})


def part(*shape: int, dtype: str = "uint8", name: str = "pictures") -> Tensor:
    size = 1
    for side in shape:
        size *= side
    return Tensor(name, dtype, shape, bytes(size * (4 if dtype == "float32" else 1)))


def test_what_is_right_has_no_fault() -> None:
    assert not fault_of_part(PICTURES, 1, [part(2, 64, 64, 3)])
    sound = [part(1, 2, 100, dtype="float32", name="sound"), Tensor("sound_rate", "int32", (1,), bytes(4))]
    assert not fault_of_last_part([part(2, 64, 64, 3), *sound])
    assert not fault_of_all(PICTURES, [(2, 64, 64, 3), (2, 64, 64, 3)])
    assert not fault_of_all(VIDEO, [(12, 64, 64, 3)])  # a decoder may round frames up


@pytest.mark.parametrize(
    ("number", "tensors"),
    [
        (4, [part(1, 64, 64, 3)]),
        (1, []),
        (1, [part(1, 64, 64, 4)]),
        (1, [part(1, 64, 64, 3, dtype="float32")]),
        (1, [part(1, 64 * 8, 64 * 8 + 1, 3)]),
        (1, [part(PART_BYTES // (64 * 64 * 3) + 1, 64, 64, 3)]),
    ],
)
def test_parts_that_no_job_has(number: int, tensors: list[Tensor]) -> None:
    assert fault_of_part(PICTURES, number, tensors)


def test_ends_that_no_job_has() -> None:
    assert fault_of_last_part([])
    assert fault_of_last_part([part(1, 64, 64, 3), part(2, dtype="uint8", name="sound")])
    assert fault_of_all(PICTURES, [(3, 64, 64, 3)])
    assert fault_of_all(PICTURES, [(2, 64, 64, 3), (2, 32, 64, 3)])
    assert fault_of_all(VIDEO, [(5, 64, 64, 3)])
    assert fault_of_all(VIDEO, [(22, 64, 64, 3)])
