"""The queues hold exactly the jobs that wait, in the order in which they are to be served."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dispatch import transitions
from orchestrator.dispatch.job_queue import JobQueue
from orchestrator.dispatch.quotas import Quotas
from orchestrator.dispatch.retry_delays import RetryDelays
from orchestrator.dispatch.stage_queues import StageQueues
from orchestrator.job import LiveJob
from orchestrator.settings import OrchestratorSettings
from orchestrator.storage.job_store import Store
from protocol.stages import STAGES
from tests.chance import examples
from tests.orchestrator.dispatch.test_transitions import possible
from tests.orchestrator.storage.test_job_store import job as stored_job


def queue(folder: Path) -> JobQueue:
    store = Store(None, folder)
    return JobQueue(store, Quotas(OrchestratorSettings(), store, folder), RetryDelays())


@examples(30)
@given(data=st.data())
def test_what_waits_is_queued_or_delayed_and_everything_is_counted(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_moves(data, queue(Path(folder)))


def check_moves(data: st.DataObject, jobs: JobQueue) -> None:
    live: dict[str, LiveJob] = {}
    for number in range(1, 4):
        live[f"job{number}"] = job = stored_job(number)
        jobs.count(job.state, +1)
        jobs.add(job)
    for _ in range(40):
        before = live[data.draw(st.sampled_from(sorted(live)))]
        event = data.draw(st.sampled_from(possible(before)))
        live[before.id] = after = transitions.after(before, event).job
        jobs.replace(before, after)
        assert jobs.jobs == {id: job for id, job in live.items() if not job.ended}
        queued = [id for stage in STAGES for id in jobs.queues.first(stage, before.model, 10)]
        delayed = [id for id in live if id in jobs._delays]
        assert sorted([*queued, *delayed]) == sorted(id for id, job in live.items() if job.waits)
        assert +jobs.queues.depth == {
            line: sum((j.stage, j.model, j.distance) == line for i, j in live.items() if i in queued)
            for line in {(live[i].stage, live[i].model, live[i].distance) for i in queued}
        }
        states = [job.state for job in live.values()]
        assert {state: n for state, n in jobs.counts.items() if n} == {s: states.count(s) for s in set(states)}


def test_the_order_is_by_priority_then_nearest_to_the_end_then_by_age() -> None:
    queues = StageQueues()
    old, new = stored_job(1), stored_job(2)
    urgent, nearer = stored_job(3)._replace(priority=5), stored_job(4)._replace(visits_left=1)
    for job in (new, old, urgent, nearer):
        queues.add(job)
    assert queues.first("text", old.model, 9) == ["job3", "job4", "job1", "job2"]
    assert [queues.ahead_of(job) for job in (urgent, nearer, old, new)] == [0, 1, 2, 3]
    queues.remove(nearer)
    queues.remove(nearer)  # which isn't there any more
    assert queues.at("text", old.model) == 3
    assert queues.depth["text", old.model, 1] == 0


def test_jobs_wait_longer_after_each_failure_and_a_dropped_one_never_comes_back() -> None:
    delays = RetryDelays()
    assert not delays.add("a", failures=0)
    assert not delays.add("a", failures=1)
    assert delays.add("b", failures=2)
    assert delays.add("c", failures=3)
    first = delays.next()
    delays.drop("b")
    assert first is not None
    assert delays.take() == []
    assert "b" not in delays
    assert "c" in delays
