"""A job's way through the stages: accepted, handed out, taken back, passed on, ended.

The engine changes the store and fills the outbox; it knows no sockets. Whoever drives it commits the store before it
sends what the outbox holds. Each task carries (job, stage, attempt): a result that is not of the present attempt is
dropped, so each stage commits once.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from orchestrator.dispatch.admission import Admission
from orchestrator.dispatch.fleet import Fleet, Worker
from orchestrator.dispatch.job_queue import JobQueue
from orchestrator.dispatch.leasing import Leasing
from orchestrator.dispatch.outbox import Outbox
from orchestrator.dispatch.quotas import Quotas
from orchestrator.dispatch.standstill import Place
from orchestrator.dispatch.step_deadlines import StepDeadlines
from orchestrator.dispatch.subscriptions import Subscriptions
from orchestrator.job import LiveJob
from orchestrator.memory.ledger import Account, Ledger
from orchestrator.scheduling.scheduler import Assign, ChangeLease
from orchestrator.settings import OrchestratorSettings
from orchestrator.storage.artifacts import Kind
from orchestrator.storage.job_store import Store
from protocol.errors import Conflict
from protocol.gpu_memory import GpuId
from protocol.job import JobRequest, JobState, StageRecord
from protocol.messages.client import JobEvent
from protocol.messages.common import TaskKey
from protocol.messages.worker import CancelTask, Committed, Leased, Progress, Ready, Result, Task, TaskFailed
from protocol.stages import Stage
from protocol.tensors import CHECKPOINT, Tensor

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # tries of one stage at the same point
MAX_SHORTAGES = 12  # tries of one stage that found too little memory; each asks for half as much again
MEMORY_HINT = "a smaller picture, fewer a job, a larger --budget, another GPU or --device cpu for a stage would help"
KEEP_REASONS = 16
OUTPUT: dict[Stage, Kind] = {"denoise": "latents", "vae": "pictures"}  # what a stage leaves, but for text
HOLD_SECONDS = 1.0  # after a restart, for workers to come back and say what they have in hand
LOST_NUMBERS = 2  # attempts that a killed orchestrator may have handed out without keeping their numbers


def key_of(task: TaskKey) -> tuple[str, str, int]:
    return task.job, task.stage, task.attempt


class Engine:
    def __init__(
        self,
        store: Store,
        outbox: Outbox,
        settings: OrchestratorSettings,
        accounts: Mapping[GpuId, Account],
        disk: Path,
    ) -> None:
        self.store, self.outbox, self.settings = store, outbox, settings
        self.fleet, self.subscriptions, self.pace = Fleet(), Subscriptions(), StepDeadlines(settings.step_timeout)
        quotas, ledger = Quotas(settings, store, disk), Ledger(accounts, store.workspaces())
        self.job_queue = JobQueue(store, quotas)
        self.leasing = Leasing(ledger, self.fleet, self.job_queue.queues, settings.patience, settings.keep_alive, store)
        self.admission = Admission(store, self.job_queue, quotas, self.leasing)
        self.to_restart: list[str] = []  # names of workers to be started anew, for no fault of a job's
        self._restarted: set[tuple[str, str]] = set()  # (worker, why) of those that were told so
        self.drained: set[Stage] = set(json.loads(store.setting("drained") or "[]"))
        for job in store.unfinished():
            job.attempts += LOST_NUMBERS  # so that a task of before is told from one of now
            self._adopt(job)
        self._hold_until = time.monotonic() + HOLD_SECONDS if self.job_queue.jobs else 0.0

    # -- workers come and go --------------------------------------------------------------------

    def ready(self, worker: Worker, ready: Ready) -> None:
        """A worker's hands are free, unless it says what is in them; if it drops a task without a word, that failed."""
        if worker.task and ready.current_task is None:
            self._fail(worker, worker.task, f"{worker.hello.name} dropped it", retry=True)
        worker.device_map = ready.device_map or worker.device_map
        worker.residency = ready.residency or worker.residency
        worker.context_bytes = ready.context_bytes or worker.context_bytes
        self.leasing.ready(worker, ready)
        self.leasing.moved()
        if reason := self.leasing.hopeless(worker):
            keeping = self.leasing.keeping(worker.hello.stage, worker.model)
            if not self._start_anew(keeping, f"room for {worker.hello.name}"):
                self._give_up(worker, reason)
        if ready.current_task is None:
            self.fleet.ready(worker)
        else:
            self._claimed(worker, *ready.current_task)

    def _claimed(self, worker: Worker, job_id: str, stage: Stage, attempt: int) -> None:
        """A worker that has come back has a task in hand: it goes on, unless somebody else has begun it."""
        job = self.job_queue.jobs.get(job_id)
        task = TaskKey(job=job_id, stage=stage, attempt=attempt)
        if job is None or job.worker or (job.stage, worker.hello.stage) != (stage, stage):
            self.fleet.give(worker, task, None)
            self.outbox.to_worker(worker.identity, CancelTask(job=job_id, stage=stage, attempt=attempt))
            return
        log.info("%s goes on with it", worker.hello.name, extra={"job": job_id})
        self.job_queue.take_out(job)
        self.job_queue.move(job, lambda: job.claimed_by(worker.id, attempt))
        self.fleet.give(worker, task, StepDeadlines.key(stage, job.recipe))
        self.store.note(job)
        self.announce(job)

    def lose_worker(self, worker: Worker, reason: str) -> None:
        """A worker is gone without a word; what it had in hand is tried again.

        What it holds of a GPU counts until its process is known to be gone.
        """
        self.fleet.remove(worker)
        self.leasing.left(worker)
        self.leasing.moved()
        if worker.task:
            self._fail(worker, worker.task, f"{worker.hello.name} {reason}", retry=True)

    def bury(self, worker: Worker, blameless: bool) -> None:
        """A worker's process has ended; `blameless` if what it had in hand can't have been the cause."""
        if blameless:
            self.dismiss_worker(worker)
        else:
            self.lose_worker(worker, "died")
        self.leasing.buried(worker.hello.host, worker.hello.pid)

    def dismiss_worker(self, worker: Worker) -> None:
        """A worker leaves in good order; what it had in hand waits again, and nobody is to blame."""
        self.fleet.remove(worker)
        self.leasing.left(worker)
        self.leasing.moved()
        job = self._current(worker, worker.task) if worker.task else None
        if job:
            self._wait_again(job)

    def drain(self, stage: Stage, on: bool) -> None:
        """Give a stage's workers nothing more to do, until told otherwise; it outlives a restart."""
        (self.drained.add if on else self.drained.discard)(stage)
        self.store.set("drained", json.dumps(sorted(self.drained)))

    # -- accepting ------------------------------------------------------------------------------

    def accept(self, requests: tuple[JobRequest, ...], owner: str) -> list[LiveJob]:
        """Accept all of the requests or none; those that are here already count as accepted.

        `owner` is the name of the client's key; empty for this machine's own user.
        """
        jobs, new = self.admission.admit(requests, owner)
        for job in new:
            self.job_queue.count(job.state, +1)
            self._adopt(job)
        return jobs

    def _adopt(self, job: LiveJob) -> None:
        self.job_queue.add(job)
        if job.stage == "text" and self.store.artifacts.has("text", job.text_key):
            self._skip_text(job)

    # -- handing out ----------------------------------------------------------------------------

    def assign(self) -> None:
        """Let the scheduler pair idle workers with waiting tasks and change leases, and send both."""
        self.job_queue.end_delays()
        if time.monotonic() < self._hold_until:
            return
        actions = self.leasing.decide(self.job_queue.jobs, self.drained)
        if self.leasing.standing:
            self._end_standstill(self.leasing.standing)
            return  # which has changed what there is to decide
        for action in actions:
            worker = self.fleet.workers[bytes.fromhex(action.worker)]
            match action:
                case Assign():
                    self._hand_out(self.job_queue.jobs[action.job], worker)
                case ChangeLease():
                    self.outbox.to_worker(worker.identity, self.leasing.lend(worker, action))

    def _end_standstill(self, places: Sequence[Place]) -> None:
        """Tasks wait and nothing changes: start those anew that keep memory; else the first tasks fail, with why."""
        self.leasing.moved()
        firsts = [(place, job) for place in places for job in self.job_queue.queues.first(*place, 1)]
        if any(self._start_anew(self.leasing.keeping(*place), f"{place[0]} {job}") for place, job in firsts):
            return
        for (stage, model), job_id in firsts:
            self.job_queue.take_out(job := self.job_queue.jobs[job_id])
            self._blame(job, f"{self.leasing.account(stage, model, job)}; {MEMORY_HINT}", retry=False)

    def _start_anew(self, workers: Iterable[Worker], why: str) -> bool:
        """Have processes replaced that keep memory which they should have given back; no job is to blame.

        Once each for the same reason `why`; return whether there was any.
        """
        fresh = [worker.hello.name for worker in workers if (worker.hello.name, why) not in self._restarted]
        for name in fresh:
            self._restarted.add((name, why))
            log.warning("%s keeps GPU memory that it should have given back; it is started anew", name)
            self.to_restart.append(name)
        return bool(fresh)

    def next_due(self) -> float | None:
        """Monotonic seconds when `assign` will have something to do, if nothing comes before; None if nothing will."""
        times = [self._hold_until] if time.monotonic() < self._hold_until else []
        if (due := self.job_queue.next_due()) is not None:
            times.append(due)
        return min(times, default=None)

    def _hand_out(self, job: LiveJob, worker: Worker) -> None:
        tensors = self._inputs(job)
        if tensors is None:
            log.warning("an artifact of the stage before %s is gone; going back", job.stage, extra={"job": job.id})
            self._go_back(job)
            return
        self.job_queue.take_out(job)
        self.job_queue.move(job, lambda: job.hand_to(worker.id))
        self.leasing.moved()
        task = Task(
            job=job.id, stage=job.stage, attempt=job.attempt, recipe=job.recipe,
            allow_tiling=not self.leasing.more(worker),
        )  # fmt: skip
        self.store.note(job)
        self.fleet.give(worker, task, StepDeadlines.key(job.stage, job.recipe))
        self.outbox.to_worker(worker.identity, task, tensors)
        self.announce(job)

    def _inputs(self, job: LiveJob) -> tuple[Tensor, ...] | None:
        match job.stage:
            case "text":
                return ()
            case "denoise":
                embeddings = self.store.artifacts.get("text", job.text_key)
                return embeddings and (*embeddings, *self._checkpoint(job))
            case "vae":
                return self.store.artifacts.get("latents", job.id)

    def _checkpoint(self, job: LiveJob) -> tuple[Tensor, ...]:
        """Where the last attempt had come to."""
        if not job.saved:
            return ()
        found = self.store.artifacts.get("checkpoint", job.id)
        if found is None:
            self._begin_anew(job)
        return found or ()

    def _begin_anew(self, job: LiveJob) -> None:
        """The stage's first step comes next, whatever was saved."""
        self._drop_checkpoint(job)
        self.store.update(job)

    def _drop_checkpoint(self, job: LiveJob) -> None:
        if job.saved:
            job.saved = 0
            self.store.artifacts.drop("checkpoint", job.id)

    def _go_back(self, job: LiveJob) -> None:
        """Run the stage again whose artifact was lost; equal recipes give equal bits, so nothing is lost with it."""
        self.job_queue.take_out(job)
        job.stage = "denoise" if job.stage == "vae" else "text"
        self.store.update(job)
        self.job_queue.queues.add(job)

    # -- what workers say -----------------------------------------------------------------------

    def progress(self, worker: Worker, task: Progress, tensors: tuple[Tensor, ...]) -> None:
        """Steps are done; a checkpoint is kept before anybody hears of them."""
        job = self._current(worker, task)
        if job is None:
            return
        self.pace.moved(worker, job.recipe, task.step)
        job.step = task.step
        if task.saved > job.saved and tensors and all(tensor.name.startswith(CHECKPOINT) for tensor in tensors):
            self.store.artifacts.put("checkpoint", job.id, tensors)
            job.saved = task.saved
            self.store.update(job)
        self.announce(job)

    def result(self, worker: Worker, result: Result, tensors: tuple[Tensor, ...]) -> None:
        """Commit a stage's outcome, once."""
        worker.done += 1
        job = self._current(worker, result)
        self.outbox.to_worker(worker.identity, Committed(job=result.job, stage=result.stage, attempt=result.attempt))
        if job is None:
            log.info("late result of attempt %d dropped", result.attempt, extra={"job": result.job})
            return
        self.leasing.learn(worker, job.recipe, result.workspace_bytes)
        self.leasing.learn_step_seconds(worker, job.recipe, result.seconds)
        record = StageRecord(
            stage=result.stage, worker=worker.hello.name, attempt=result.attempt, seconds=result.seconds,
            peak_bytes=result.peak_bytes, warnings=result.warnings, device_kind=worker.hello.device_kind,
            versions=worker.hello.versions,
        )  # fmt: skip
        if result.stage == "text":
            self._keep_embeddings(job, tensors)
        else:
            self.store.artifacts.put(OUTPUT[result.stage], job.id, tensors)
        self.pace.moved(worker, job.recipe, worker.step + 1)
        if result.stage == "denoise":
            self._drop_checkpoint(job)
        if result.stage == "vae":
            self._finish(job, record)
        else:
            self._pass_on(job, record)

    def failed(self, worker: Worker, failure: TaskFailed) -> None:
        """An attempt failed. One that had too little memory is no failure where more can be had."""
        job, reason = self._current(worker, failure), f"{worker.hello.name}: {failure.reason}"
        if job and job.saved and not failure.out_of_memory:
            self._begin_anew(job)  # in case that what it began with is to blame
        if job and failure.cancelled:
            self._wait_again(job)  # what we cancelled is no longer this worker's; so it was somebody else's mistake
        elif not (job and failure.out_of_memory):
            self._fail(worker, failure, reason, failure.retry)
        elif self._may_be_short(job) and self.leasing.shortage(worker, job.recipe):
            log.warning("%s had too little memory; it gets more", failure.stage, extra={"job": job.id})
            self._wait_again(job)
        else:
            self._fail(worker, failure, reason, failure.retry and not self.leasing.held(worker))

    @staticmethod
    def _may_be_short(job: LiveJob) -> bool:
        """Whether one more try without enough memory is no failure."""
        job.shortages += 1
        return job.shortages <= MAX_SHORTAGES

    def leased(self, worker: Worker, leased: Leased) -> None:
        """A worker has done what its lease said; or could not, which is a failure of what waited for it."""
        if not self.leasing.leased(worker, leased):
            self.lose_worker(worker, "answered a lease with another")
            return
        self._start_anew([w for w in self.leasing.leaking() if w is worker], f"leaks {worker.id}")
        if leased.reason:
            for job_id in self.job_queue.queues.first(worker.hello.stage, worker.model, 1):
                self.job_queue.take_out(job := self.job_queue.jobs[job_id])
                self._blame(job, f"{worker.hello.name}: {leased.reason}", retry=True)
        self.fleet.ready(worker)

    def _give_up(self, worker: Worker, reason: str) -> None:
        """Nothing that waits for this worker can ever be done."""
        log.error("%s", reason)
        stage = worker.hello.stage
        alike = [w for w in self.fleet if (w.hello.stage, w.model) == (stage, worker.model)]
        if all((w.hello.host, w.hello.pid) == (worker.hello.host, worker.hello.pid) for w in alike):
            for job_id in self.job_queue.queues.first(stage, worker.model, self.job_queue.queues.depth[stage]):
                self.job_queue.take_out(job := self.job_queue.jobs[job_id])
                self._blame(job, reason, retry=False)

    def _current(self, worker: Worker, task: TaskKey) -> LiveJob | None:
        """The job that a worker's message is about, if it has it in hand and the message is of its present attempt."""
        job = self.job_queue.jobs.get(task.job)
        return job if job and job.worker == worker.id and (job.id, job.stage, job.attempt) == key_of(task) else None

    def _pass_on(self, job: LiveJob, record: StageRecord) -> None:
        self.job_queue.move(job, lambda: job.finish_stage(record))
        self.store.update(job)
        self.job_queue.queues.add(job)
        self.announce(job)

    def _skip_text(self, job: LiveJob) -> None:
        """The prompt's embeddings are known: no text worker is needed."""
        self.job_queue.take_out(job)
        self.store.artifacts.touch("text", job.text_key)
        job.cached = True
        self._pass_on(job, StageRecord(stage="text", worker="cache", attempt=job.attempt, seconds=0.0, cached=True))

    def _keep_embeddings(self, job: LiveJob, tensors: tuple[Tensor, ...]) -> None:
        self.store.artifacts.put("text", job.text_key, tensors)
        self.store.artifacts.shrink("text", self.settings.embedding_cache, spare=self.job_queue.texts())
        for other in self.job_queue.of_text(job.text_key):
            if other is not job and other.stage == "text" and other.worker is None:
                self._skip_text(other)

    def _finish(self, job: LiveJob, record: StageRecord) -> None:
        job.pictures = job.recipe.num_images
        job.finish_stage(record)
        self._end(job, "done")
        for gone in self.store.artifacts.shrink("pictures", self.settings.keep_pictures, spare=(job.id,)):
            self._without_pictures(gone)

    def _without_pictures(self, job_id: str) -> None:
        if job := self.store.job(job_id):
            job.pictures = 0
            self.store.update(job)

    def _fail(self, worker: Worker, task: TaskKey, reason: str, retry: bool) -> None:
        if job := self._current(worker, task):
            self._blame(job, reason, retry)

    def _blame(self, job: LiveJob, reason: str, retry: bool) -> None:
        """An attempt of a job that is in no queue has failed."""
        log.warning("%s failed: %s", job.stage, reason, extra={"job": job.id})
        job.reasons = (*job.reasons, f"{job.stage}, attempt {job.attempt}: {reason}")[-KEEP_REASONS:]
        job.count_failure()
        if retry and job.failures < MAX_ATTEMPTS:
            self._wait_again(job)
        else:
            self._end(job, "failed")

    def _wait_again(self, job: LiveJob) -> None:
        job.hand_back()
        self.store.update(job)
        self.job_queue.wait(job)
        self.announce(job)

    # -- ending ---------------------------------------------------------------------------------

    def cancel(self, job: LiveJob) -> None:
        """End a job at once; a worker that has it in hand stops at its next step."""
        if job.worker:
            task = CancelTask(job=job.id, stage=job.stage, attempt=job.attempt)
            self.outbox.to_worker(bytes.fromhex(job.worker), task)
        else:
            self.job_queue.take_out(job)
        self._end(job, "cancelled")

    def retry(self, job: LiveJob) -> LiveJob:
        """Queue a failed or cancelled job again, from its last finished stage."""
        if job.state not in ("failed", "cancelled"):
            raise Conflict(f"Job {job.id} is {job.state}.", "Only failed and cancelled jobs can be tried again.")
        self.job_queue.count(job.state, -1)
        self._revive(job)
        return job

    def make_again(self, job: LiveJob) -> None:
        """A finished job whose pictures can't be read any more runs again; its recipe gives the same bits."""
        self.job_queue.count(job.state, -1)
        job.stage, job.pictures, job.records = "text", 0, ()
        self._revive(job)

    def _revive(self, job: LiveJob) -> None:
        job.state, job.finished, job.failures, job.saved_at_failure = "queued", None, 0, -1
        self.job_queue.count(job.state, +1)
        self._adopt(job)
        self.store.update(job)

    def forget_old(self, before: float, limit: int) -> list[LiveJob]:
        """Remove jobs that ended before a moment (seconds since the epoch), the oldest `limit` of them."""
        gone = [job for job in self.store.ended_before(before, limit) if job.id not in self.job_queue.jobs]
        for job in gone:
            self.store.forget(job)
            self.job_queue.count(job.state, -1)
        return gone

    def _end(self, job: LiveJob, state: JobState) -> None:
        self.job_queue.move(job, lambda: job.end(state, time.time()))
        self._drop_checkpoint(job)
        if state != "failed":
            self.store.artifacts.drop("latents", job.id)
        self.store.update(job)
        self.job_queue.remove(job)
        self.leasing.moved()
        log.info("%s", state, extra={"job": job.id})
        self.announce(job)
        self.subscriptions.forget_job(job.id)

    # -- telling --------------------------------------------------------------------------------

    def announce(self, job: LiveJob) -> None:
        for client in self.subscriptions.of(job.id):
            self.outbox.to_client(client, self.event(job))

    def event(self, job: LiveJob) -> JobEvent:
        running = job.worker is not None
        return JobEvent(
            job=job.id,
            state=job.state,
            running=running,
            step=job.step,
            steps=job.recipe.steps,
            cached=job.cached,
            ahead=0 if running or job.ended else self.job_queue.queues.ahead_of(job),
            reason=job.reasons[-1] if job.state == "failed" and job.reasons else "",
        )
