"""Figures that benchmarks reckon from their timings."""

import pytest

from scripts.bench.gpu_stacks import EDGE, steady_seconds


@pytest.mark.parametrize("apart", [0.0, 0.01, 1.0])
def test_a_steady_state_is_the_same_whether_gpus_end_together_or_in_turns(apart: float) -> None:
    """Four GPUs that take four seconds a job each, and a queue that fills and drains slowly."""
    ends = [100.0 + 4 * number + apart * gpu for number in range(8) for gpu in range(4)]
    slow = 4 * EDGE
    ends[: slow - 1] = [end - 50 for end in ends[: slow - 1]]
    ends[-slow:] = [end + 50 for end in ends[-slow:]]
    assert steady_seconds(ends[::-1], 4) == pytest.approx(1.0)


def test_too_few_jobs_have_no_steady_state() -> None:
    assert steady_seconds([1.0] * (2 * EDGE * 4 + 3), 4) == 0.0
