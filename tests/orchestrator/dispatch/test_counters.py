"""Counting what happens to jobs."""

import pytest

from orchestrator.dispatch import transitions
from orchestrator.dispatch.counters import LIMITS, Counters, Distribution
from orchestrator.dispatch.transitions import after
from orchestrator.job import LiveJob
from orchestrator.principal import KeyHolder
from protocol.job import Recipe, StageRecord
from protocol.metrics import Metric


def a_job(**fields: object) -> LiveJob:
    recipe = Recipe(
        prompt="a", negative_prompt=None, width=64, height=32, steps=8, guidance=None, cfg_scale=None, seed=1,
        num_images=1, max_sequence_length=None, model="m", revision="r", dtype="float32",
    )  # fmt: skip
    given = {
        "id": "j",
        "number": 1,
        "priority": 0,
        "recipe": recipe,
        "text_key": "t",
        "request": "{}",
        "created": 100.0,
    }
    return LiveJob(**given | fields)


def one(counters: Counters, name: str) -> Metric:
    return next(metric for metric in counters.metrics() if metric.name == name)


def test_a_jobs_way_is_counted() -> None:
    counters, job = Counters(lambda job: "flux"), a_job(owner=KeyHolder("ann"))

    def happens(event: transitions.Event, now: float) -> None:
        nonlocal job
        changed = after(job, event).job
        counters.happened(job, event, changed, now)
        job = changed

    happens(transitions.HandedOut("w"), 107.0)
    happens(transitions.HandedBack(), 108.0)
    happens(transitions.HandedOut("w"), 109.0)  # waiting again is no wait for the first task
    record = StageRecord(stage="text", worker="w", attempt=2, seconds=0.3)
    happens(transitions.StageDone(record, "denoise", 110.0), 110.0)
    happens(transitions.HandedOut("w"), 110.0)
    happens(transitions.StageDone(record.model_copy(update={"stage": "vae"}), None, 130.0), 130.0)
    (wait,) = one(counters, "queue_wait_seconds").samples
    assert (wait.value, sum(wait.counts)) == (7.0, 1)
    assert one(counters, "recoveries_total").samples[0].labels == ("text", "handed_back")
    assert one(counters, "jobs_total").samples[0].labels == ("done", "flux", "key")
    assert one(counters, "job_seconds").samples[0].value == 30.0
    assert {sample.labels for sample in one(counters, "stage_seconds").samples} == {("text", "flux"), ("vae", "flux")}


@pytest.mark.parametrize(("seconds", "place"), [(0.0, 0), (0.01, 0), (0.011, 1), (1e9, len(LIMITS))])
def test_a_distribution_counts_up_to_each_limit(seconds: float, place: int) -> None:
    found = Distribution()
    found.add(seconds)
    assert found.counts.index(1) == place
