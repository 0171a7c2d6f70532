"""As many hosts as the work is worth: more where what waits outlasts a start, fewer once fewer have been enough."""

import random

import pytest

from orchestrator.scheduling.autoscaling import Autoscaler, ScalingTerms, Work, least_busy

TERMS = ScalingTerms(gpus=8, most=10, least=1, start_seconds=60.0, patience=30.0)


@pytest.mark.parametrize(
    ("waiting", "busy", "starting", "wanted"),
    [
        (0.0, [], 0, 1),  # at least
        (0.0, [0], 0, 1),
        (400.0, [8], 0, 1),  # done before another could be here
        (480.0 + 240.0, [8], 0, 2),  # one host's worth of patience is left then
        (480.0 + 241.0, [8], 0, 3),
        (480.0 + 241.0, [8], 2, 3),  # which come already
        (1e9, [8], 0, 10),  # at most
    ],
)
def test_more_hosts_where_what_waits_would_still_wait_when_they_are_here(
    waiting: float, busy: list[int], starting: int, wanted: int
) -> None:
    assert Autoscaler(TERMS).wanted(Work(waiting, busy, starting), 0.0) == wanted


def test_none_while_nothing_is_to_be_done_and_one_for_the_first_job() -> None:
    scaler = Autoscaler(ScalingTerms(gpus=8, most=4, least=0))
    assert scaler.wanted(Work(0.0, []), 0.0) == 0
    assert scaler.wanted(Work(5.0, []), 1.0) == 1


def test_fewer_once_fewer_have_been_enough_for_as_long_as_a_start_takes() -> None:
    scaler = Autoscaler(TERMS)
    quiet, busier = Work(0.0, [8, 1, 1]), Work(0.0, [8, 8, 1])
    assert scaler.wanted(quiet, 0.0) == 3
    assert scaler.wanted(quiet, 59.0) == 3
    assert scaler.wanted(quiet, 60.0) == 2
    assert scaler.wanted(quiet, 61.0) == 2  # until that is done
    assert scaler.wanted(busier, 62.0) == 3
    assert scaler.wanted(quiet, 63.0) == 3
    assert scaler.wanted(quiet, 123.0) == 2
    assert scaler.wanted(Work(0.0, [0, 0]), 124.0) == 2
    assert scaler.wanted(Work(0.0, [0, 0]), 190.0) == 1  # at least


def test_it_never_leaves_its_limits_and_never_goes_to_and_fro_within_a_start() -> None:
    chance = random.Random(1)
    scaler, hosts, last_more = Autoscaler(TERMS), 1, -1e9
    for second in range(20_000):
        busy = [chance.randint(0, 8) for _ in range(hosts)]
        wanted = scaler.wanted(Work(chance.choice([0.0, 0.0, 0.0, 3000.0]) * (second % 700 < 100), busy), float(second))
        assert TERMS.least <= wanted <= TERMS.most
        assert not (wanted < hosts and second - last_more < TERMS.start_seconds)
        last_more = second if wanted > hosts else last_more
        hosts = wanted


def test_the_host_with_the_least_to_do_is_spared() -> None:
    assert least_busy([3, 1, 2]) == 1


def test_light_and_steady_work_keeps_no_more_hosts_than_it_needs() -> None:
    """A job of 10 s each 30 s, which waits for 4 s until its weights are in."""
    scaler, hosts = Autoscaler(ScalingTerms(gpus=1, most=8, least=0)), 8
    for second in range(600):
        waits, works = second % 30 < 4, 4 <= second % 30 < 14
        busy = [int(works)] + [0] * (hosts - 1)
        hosts = scaler.wanted(Work(10.0 if waits else 0.0, busy), float(second))
    assert hosts == 1
