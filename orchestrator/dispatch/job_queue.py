"""Unfinished jobs: by their ids and the text that they share, waiting at stages or for a moment, and counted."""

from collections import Counter
from collections.abc import Container

from orchestrator.dispatch.common_stages import CommonStages
from orchestrator.dispatch.quotas import Quotas
from orchestrator.dispatch.retry_delays import RetryDelays
from orchestrator.dispatch.stage_queues import StageQueues
from orchestrator.dispatch.task_seconds import TaskSeconds
from orchestrator.job import LiveJob, ModelKey
from orchestrator.principal import Principal, kept_name
from orchestrator.scheduling.fair_shares import FairShares
from orchestrator.storage.job_store import Store
from protocol.errors import NotFound
from protocol.job import JobState
from protocol.stages import USUAL_NEXT, Stage


class JobQueue:
    def __init__(
        self,
        store: Store,
        quotas: Quotas,
        delays: RetryDelays,
        shares: FairShares[Principal] | None = None,
        common: CommonStages | None = None,
    ) -> None:
        self._store, self._quotas = store, quotas
        self._shares = shares or FairShares[Principal]()
        self.seconds = TaskSeconds(self._shares)
        self.jobs: dict[str, LiveJob] = {}
        self.queues = StageQueues(self._shares, self.seconds, common)
        self.counts: dict[JobState, int] = store.counts()  # of all jobs, ended ones too
        self._delays = delays
        self._by_text: dict[str, set[str]] = {}
        self.by_model: Counter[ModelKey] = Counter()
        self._inputs: Counter[str] = Counter()  # jobs that begin from a picture, by its name

    def find(self, job_id: str) -> LiveJob | None:
        """A job, ended ones too."""
        return self.jobs.get(job_id) or self._store.job(job_id)

    def known(self, job_id: str) -> LiveJob:
        job = self.find(job_id)
        if job is None:
            raise NotFound(f"There is no job {job_id!r}.", "'triptych jobs' lists those that there are.")
        return job

    def texts(self) -> Container[str]:
        """Keys of embeddings that some job needs, or will."""
        return self._by_text.keys()

    def inputs(self) -> Container[str]:
        """Names of the pictures that some job begins from, as they are kept."""
        return self._inputs.keys()

    def of_text(self, key: str) -> list[LiveJob]:
        return [self.jobs[job_id] for job_id in self._by_text.get(key, ())]

    def waiting_seconds(self, drained: Container[Stage] = ()) -> float:
        """Return the seconds of workers that the tasks of all waiting jobs may take, up to a stage that is drained."""
        total = 0.0
        for (stage, _, _), count in self.queues.depth.items():
            left: Stage | None = stage
            while count and left and left not in drained:
                total += count * self.seconds.lately(left)
                left = USUAL_NEXT[left]
        return total

    # -- coming, moving and going ---------------------------------------------------------------

    def add(self, job: LiveJob) -> None:
        """Add a job that begins, or is there again: it waits at its stage."""
        self.jobs[job.id] = job
        self._quotas.add(job)
        self._shares.add(job.owner)
        self._by_text.setdefault(job.text_key, set()).add(job.id)
        self.by_model[job.model] += 1
        self._inputs.update(_inputs_of(job))
        self.queues.add(job)

    def replace(self, before: LiveJob, after: LiveJob) -> None:
        """Put what a job has become in its place: counted by its state, and waiting where it waits now."""
        if before.state != after.state:
            self.count(before.state, -1)
            self.count(after.state, +1)
        if before.worker is None and after.worker is not None:
            self.seconds.begin(after.worker, after)
        if before.ended:
            if not after.ended:
                self.add(after)
            return
        stays = before.waits and after.waits and _place(before) == _place(after)
        if before.waits and not stays:
            self.queues.remove(before)
            self._delays.drop(before.id)
        if after.ended:
            self._remove(after)
            return
        self.jobs[after.id] = after
        if after.waits and not stays and not self._delays.add(after.id, after.failures):
            self.queues.add(after)

    def _remove(self, job: LiveJob) -> None:
        del self.jobs[job.id]
        self._shares.remove(job.owner)
        self._quotas.add(job, -1)
        self.by_model[job.model] -= 1
        for name in _inputs_of(job):
            self._inputs[name] -= 1
            if not self._inputs[name]:
                del self._inputs[name]
        same_text = self._by_text[job.text_key]
        same_text.discard(job.id)
        if not same_text:
            del self._by_text[job.text_key]

    def count(self, state: JobState, by: int) -> None:
        self.counts[state] = self.counts.get(state, 0) + by

    # -- waiting for a moment -------------------------------------------------------------------

    def end_delays(self) -> None:
        """Let jobs whose delay is over wait at their stages."""
        for job_id in self._delays.take():
            self.queues.add(self.jobs[job_id])

    def next_due(self) -> float | None:
        """Monotonic seconds when the next delay is over; None if there is none."""
        return self._delays.next()


def _inputs_of(job: LiveJob) -> list[str]:
    return [kept_name(job.owner, digest) for digest in job.recipe.pictures]


def _place(job: LiveJob) -> tuple[object, ...]:
    """Return what decides where and how a job waits."""
    return job.stage, job.order, job.failures
