"""Busy, or stuck."""

import os

from orchestrator.pulse import Pulse, PulseWatch


def test_a_loop_that_turns_is_told_from_one_that_stands() -> None:
    watch = PulseWatch()
    pulse = Pulse(os.dup(watch.descriptor))
    watch._moved -= 100.0
    assert watch.still_for() >= 0.0
    watch._moved -= 100.0
    assert watch.still_for() >= 100.0
    pulse.beat()
    assert watch.still_for() < 100.0
    Pulse(None).beat()  # nobody looks
    assert pulse._descriptor is not None
    os.close(pulse._descriptor)
    watch.close()
