"""Unfinished jobs: by their ids, by the text that they share, waiting at their stages or for a moment, and counted."""

from collections.abc import Callable, Container

from orchestrator.dispatch.quotas import Quotas
from orchestrator.dispatch.retry_delays import RetryDelays
from orchestrator.dispatch.stage_queues import StageQueues
from orchestrator.job import LiveJob
from orchestrator.storage.job_store import Store
from protocol.errors import NotFound
from protocol.job import JobState


class JobQueue:
    def __init__(self, store: Store, quotas: Quotas) -> None:
        self._store, self._quotas = store, quotas
        self.jobs: dict[str, LiveJob] = {}
        self.queues = StageQueues()
        self.counts: dict[JobState, int] = store.counts()  # of all jobs, ended ones too
        self._delays = RetryDelays()
        self._by_text: dict[str, set[str]] = {}

    def find(self, job_id: str) -> LiveJob | None:
        """A job, ended ones too."""
        return self.jobs.get(job_id) or self._store.job(job_id)

    def known(self, job_id: str) -> LiveJob:
        job = self.find(job_id)
        if job is None:
            raise NotFound(f"There is no job {job_id!r}.", "'triptych jobs' lists those that there are.")
        return job

    def texts(self) -> Container[str]:
        """Keys of embeddings that somebody needs, or will."""
        return self._by_text.keys()

    def of_text(self, key: str) -> list[LiveJob]:
        return [self.jobs[job_id] for job_id in self._by_text.get(key, ())]

    # -- coming and going -----------------------------------------------------------------------

    def add(self, job: LiveJob) -> None:
        """A job begins, or is there again after a restart: it waits at its stage."""
        self.jobs[job.id] = job
        self._quotas.add(job)
        self._by_text.setdefault(job.text_key, set()).add(job.id)
        self.queues.add(job)

    def remove(self, job: LiveJob) -> None:
        """One that waits nowhere has ended."""
        del self.jobs[job.id]
        self._quotas.add(job, -1)
        same_text = self._by_text[job.text_key]
        same_text.discard(job.id)
        if not same_text:
            del self._by_text[job.text_key]

    # -- waiting --------------------------------------------------------------------------------

    def wait(self, job: LiveJob) -> None:
        """Let a job wait at its stage, after a moment if it has failed there."""
        if not self._delays.add(job.id, job.failures):
            self.queues.add(job)

    def take_out(self, job: LiveJob) -> None:
        """It no longer waits, wherever that was."""
        self.queues.remove(job)
        self._delays.drop(job.id)

    def end_delays(self) -> None:
        """Those whose moment is over wait at their stages."""
        for job_id in self._delays.take():
            self.queues.add(self.jobs[job_id])

    def next_due(self) -> float | None:
        """Monotonic seconds when the next moment is over."""
        return self._delays.next()

    # -- counting -------------------------------------------------------------------------------

    def move(self, job: LiveJob, change: Callable[[], None]) -> None:
        """Change a job's state, keeping the counts."""
        self.count(job.state, -1)
        change()
        self.count(job.state, +1)

    def count(self, state: JobState, by: int) -> None:
        self.counts[state] = self.counts.get(state, 0) + by
