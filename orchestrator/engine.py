"""A job's way through the stages: accepted, handed out, taken back, passed on, ended.

The engine changes the store and fills the outbox; it knows no sockets. Whoever drives it commits the store before it
sends what the outbox holds. Each task carries (job, stage, attempt): a result that is not of the present attempt is
dropped, so each stage commits once.
"""

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.fleet import Fleet, Worker
from orchestrator.ledger import Account, Ledger
from orchestrator.lending import Lending
from orchestrator.live import LiveJob
from orchestrator.outbox import Outbox
from orchestrator.queues import StageQueues
from orchestrator.scheduler import Assign, Lend
from orchestrator.store import Store
from orchestrator.watchers import Watchers
from protocol.errors import Conflict, NotFound, QueueFull
from protocol.jobs import JobRequest, JobState, ModelDescription, Recipe, Stage, StageRecord
from protocol.messages import (
    CancelTask,
    Committed,
    JobEvent,
    Leased,
    Progress,
    Ready,
    Result,
    Task,
    TaskFailed,
    TaskKey,
    WorkerHello,
)
from protocol.recipes import CountTokens, resolve, text_key, token_counter
from protocol.tensors import Tensor

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # tries of one stage
KEEP_REASONS = 16
OUTPUT = {"denoise": "latents", "vae": "pictures"}  # the kind of artifact that a stage leaves, but for text


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an engine takes and keeps; `keep_alive` in seconds by stage, none for ever."""

    queue: int  # unfinished jobs
    cache_bytes: int  # of embeddings
    picture_bytes: int
    patience: float = 30.0  # seconds that a task waits for others to finish theirs, before they must give way
    keep_alive: Mapping[Stage, float] = field(default_factory=dict)


def key_of(task: TaskKey) -> tuple[str, str, int]:
    return task.job, task.stage, task.attempt


class Engine:
    def __init__(self, store: Store, outbox: Outbox, limits: Limits, accounts: Mapping[int, Account]) -> None:
        self.store, self.outbox, self.limits = store, outbox, limits
        self.fleet, self.queues, self.watchers = Fleet(), StageQueues(), Watchers()
        ledger = Ledger(accounts, store.workspaces())
        self.lending = Lending(
            ledger, self.fleet, self.queues, limits.patience, limits.keep_alive, store.remember_workspace
        )
        self.jobs: dict[str, LiveJob] = {}  # unfinished ones
        self._by_text: dict[str, set[str]] = {}  # unfinished jobs by their embeddings' key
        self.counts: dict[JobState, int] = store.counts()
        self.model: ModelDescription | None = None  # of the workers of this run
        self.dtype = ""
        self.speedups: tuple[str, ...] = ()
        self._count_tokens: CountTokens | None = None
        for job in store.unfinished():
            job.attempt += 1  # a task may have been handed out that was only noted; its result would be late
            self._adopt(job)

    # -- models and workers ---------------------------------------------------------------------

    def learn_model(self, hello: WorkerHello, tokenizer: Tensor | None) -> None:
        """Requests are judged by the model of the worker that came last."""
        model, dtype, self.speedups = hello.model, hello.dtype, hello.speedups
        data = bytes(tokenizer.data) if tokenizer else None
        if model == self.model and dtype == self.dtype and (data is None or self._count_tokens):
            return
        self.store.remember_model(model, data)
        self.model, self.dtype = model, dtype
        self._count_tokens = token_counter(self.store.tokenizer(model.revision))

    def ready(self, worker: Worker, ready: Ready) -> None:
        """A worker's hands are free; if it drops a task without a word, that was a failed attempt."""
        if worker.task:
            self._fail(worker.task, f"{worker.hello.name} dropped it", retry=True)
        worker.device_map = ready.device_map or worker.device_map
        worker.residency = ready.residency or worker.residency
        worker.context_bytes = ready.context_bytes or worker.context_bytes
        self.lending.ready(worker, ready)
        if reason := self.lending.hopeless(worker):
            self._give_up(worker, reason)
        self.fleet.ready(worker)

    def lose_worker(self, worker: Worker, reason: str) -> None:
        """A worker is gone without a word; what it had in hand is tried again.

        What it holds of a GPU counts until its process is known to be gone.
        """
        self.fleet.remove(worker)
        self.lending.left(worker)
        if worker.task:
            self._fail(worker.task, f"{worker.hello.name} {reason}", retry=True)

    def bury(self, worker: Worker) -> None:
        """A worker's process has ended."""
        self.lose_worker(worker, "died")
        self.lending.buried(worker.hello.host, worker.hello.pid)

    def dismiss_worker(self, worker: Worker) -> None:
        """A worker leaves in good order; what it had in hand waits again, and nobody is to blame."""
        self.fleet.remove(worker)
        self.lending.left(worker)
        job = self._current(worker.task) if worker.task else None
        if job:
            self._wait_again(job)

    # -- accepting ------------------------------------------------------------------------------

    def accept(self, requests: tuple[JobRequest, ...]) -> list[LiveJob]:
        """Accept all of the requests or none; those that are here already count as accepted."""
        if self.model is None:
            raise NotFound("No worker has joined yet, so the model is not known.")
        named = [self._known(request) for request in requests]
        fresh = [request for request, known in zip(requests, named, strict=True) if known is None]
        ids = [request.id for request in fresh if request.id is not None]
        if len(set(ids)) < len(ids):
            raise Conflict("The same job id is given twice.", "Give each job an id of its own, or none.")
        if len(self.jobs) + len(fresh) > self.limits.queue:
            raise QueueFull(
                f"The queue holds {len(self.jobs)} of at most {self.limits.queue} jobs; {len(fresh)} more don't fit.",
                "Wait for some to finish, cancel some, or start the stack with a larger --queue-limit.",
            )
        recipes = [resolve(request, self.model, self.dtype, self._count_tokens, self.speedups) for request in fresh]
        for recipe in recipes:
            self.lending.refuse_what_never_fits(recipe, self.model)
        made = iter([self._create(request, recipe) for request, recipe in zip(fresh, recipes, strict=True)])
        return [known or next(made) for known in named]

    def _known(self, request: JobRequest) -> LiveJob | None:
        job = self.find(request.id) if request.id else None
        if job and job.request != request.model_dump_json():
            raise Conflict(f"The job id {job.id!r} is taken by a different job.", "Choose another, or give none.")
        return job

    def _create(self, request: JobRequest, recipe: Recipe) -> LiveJob:
        job = LiveJob(
            id=request.id or secrets.token_hex(6),
            number=self.store.next_number(),
            priority=request.priority,
            recipe=recipe,
            text_key=text_key(recipe),
            request=request.model_dump_json(),
            created=time.time(),
        )
        self.store.insert(job)
        self._count(job.state, +1)
        self._adopt(job)
        return job

    def _adopt(self, job: LiveJob) -> None:
        self.jobs[job.id] = job
        self._by_text.setdefault(job.text_key, set()).add(job.id)
        self.queues.add(job)
        if job.stage == "text" and self.store.has("text", job.text_key):
            self._skip_text(job)

    def find(self, job_id: str) -> LiveJob | None:
        return self.jobs.get(job_id) or self.store.job(job_id)

    def known(self, job_id: str) -> LiveJob:
        job = self.find(job_id)
        if job is None:
            raise NotFound(f"There is no job {job_id!r}.", "'triptych jobs' lists those that there are.")
        return job

    # -- handing out ----------------------------------------------------------------------------

    def assign(self) -> None:
        """Let the scheduler pair idle workers with waiting tasks and change leases, and send both."""
        for action in self.lending.decide(self.jobs):
            worker = self.fleet.workers[bytes.fromhex(action.worker)]
            match action:
                case Assign():
                    self._hand_out(self.jobs[action.job], worker)
                case Lend():
                    self.outbox.to_worker(worker.identity, self.lending.lend(worker, action))

    def _hand_out(self, job: LiveJob, worker: Worker) -> None:
        tensors = self._inputs(job)
        if tensors is None:
            log.warning("an artifact of the stage before %s is gone; going back", job.stage, extra={"job": job.id})
            self._go_back(job)
            return
        self.queues.remove(job)
        self._move(job, lambda: job.hand_to(worker.id))
        task = Task(
            job=job.id, stage=job.stage, attempt=job.attempt, recipe=job.recipe, make_do=not self.lending.more(worker)
        )  # fmt: skip
        self.store.note(job)
        self.fleet.give(worker, task)
        self.outbox.to_worker(worker.identity, task, tensors)
        self.announce(job)

    def _inputs(self, job: LiveJob) -> tuple[Tensor, ...] | None:
        match job.stage:
            case "text":
                return ()
            case "denoise":
                return self.store.get("text", job.text_key)
            case "vae":
                return self.store.get("latents", job.id)

    def _go_back(self, job: LiveJob) -> None:
        """Run the stage again whose artifact was lost; equal recipes give equal bits, so nothing is lost with it."""
        self.queues.remove(job)
        job.stage = "denoise" if job.stage == "vae" else "text"
        self.store.update(job)
        self.queues.add(job)

    # -- what workers say -----------------------------------------------------------------------

    def progress(self, task: Progress) -> None:
        if job := self._current(task):
            job.step = task.step
            self.announce(job)

    def result(self, worker: Worker, result: Result, tensors: tuple[Tensor, ...]) -> None:
        """Commit a stage's outcome, once."""
        worker.done += 1
        job = self._current(result)
        self.outbox.to_worker(worker.identity, Committed(job=result.job, stage=result.stage, attempt=result.attempt))
        if job is None:
            log.info("late result of attempt %d dropped", result.attempt, extra={"job": result.job})
            return
        self.lending.learn(worker, job.recipe, result.workspace_bytes)
        record = StageRecord(
            stage=result.stage, worker=worker.hello.name, attempt=result.attempt, seconds=result.seconds,
            peak_bytes=result.peak_bytes, warnings=result.warnings,
        )  # fmt: skip
        if result.stage == "text":
            self._keep_embeddings(job, tensors)
        else:
            self.store.put(OUTPUT[result.stage], job.id, tensors)
        if result.stage == "vae":
            self._finish(job, record)
        else:
            self._pass_on(job, record)

    def failed(self, worker: Worker, failure: TaskFailed) -> None:
        """An attempt failed. One that had too little memory is no failure where more can be had."""
        job, reason = self._current(failure), f"{worker.hello.name}: {failure.reason}"
        if not (job and failure.out_of_memory):
            self._fail(failure, reason, failure.retry)
        elif self.lending.shortage(worker, job.recipe):
            log.warning("%s had too little memory; it gets more", failure.stage, extra={"job": job.id})
            self._wait_again(job)
        else:
            self._fail(failure, reason, failure.retry and not worker.lease_bytes)

    def leased(self, worker: Worker, leased: Leased) -> None:
        """A worker has done what its lease said; or could not, which is a failure of what waited for it."""
        if not self.lending.leased(worker, leased):
            return
        if leased.reason:
            for job_id in self.queues.first(worker.hello.stage, worker.model, 1):
                self.queues.remove(job := self.jobs[job_id])
                self._blame(job, f"{worker.hello.name}: {leased.reason}", retry=True)
        self.fleet.ready(worker)

    def _give_up(self, worker: Worker, reason: str) -> None:
        """Nothing that waits for this worker can ever be done."""
        log.error("%s", reason)
        stage = worker.hello.stage
        others = [w for w in self.fleet if w is not worker and (w.hello.stage, w.model) == (stage, worker.model)]
        if not others:
            for job_id in self.queues.first(stage, worker.model, self.queues.depth[stage]):
                self.queues.remove(job := self.jobs[job_id])
                self._blame(job, reason, retry=False)

    def _current(self, task: TaskKey) -> LiveJob | None:
        """The job that a message is about, if the message is of its present attempt."""
        job = self.jobs.get(task.job)
        if job and job.worker and (job.id, job.stage, job.attempt) == key_of(task):
            return job
        return None

    def _pass_on(self, job: LiveJob, record: StageRecord) -> None:
        self._move(job, lambda: job.finish_stage(record))
        self.store.update(job)
        self.queues.add(job)
        self.announce(job)

    def _skip_text(self, job: LiveJob) -> None:
        """The prompt's embeddings are known: no text worker is needed."""
        self.queues.remove(job)
        self.store.touch("text", job.text_key)
        job.cached = True
        self._pass_on(job, StageRecord(stage="text", worker="cache", attempt=job.attempt, seconds=0.0, cached=True))

    def _keep_embeddings(self, job: LiveJob, tensors: tuple[Tensor, ...]) -> None:
        self.store.put("text", job.text_key, tensors)
        self.store.shrink("text", self.limits.cache_bytes, spare=self._by_text)
        for other_id in list(self._by_text.get(job.text_key, ())):
            other = self.jobs[other_id]
            if other is not job and other.stage == "text" and other.worker is None:
                self._skip_text(other)

    def _finish(self, job: LiveJob, record: StageRecord) -> None:
        job.pictures = job.recipe.num_images
        job.finish_stage(record)
        self._end(job, "done")
        for gone in self.store.shrink("pictures", self.limits.picture_bytes, spare=(job.id,)):
            self._without_pictures(gone)

    def _without_pictures(self, job_id: str) -> None:
        if job := self.store.job(job_id):
            job.pictures = 0
            self.store.update(job)

    def _fail(self, task: TaskKey, reason: str, retry: bool) -> None:
        if job := self._current(task):
            self._blame(job, reason, retry)

    def _blame(self, job: LiveJob, reason: str, retry: bool) -> None:
        """An attempt of a job that is in no queue has failed."""
        log.warning("%s failed: %s", job.stage, reason, extra={"job": job.id})
        job.reasons = (*job.reasons, f"{job.stage}, attempt {job.attempt}: {reason}")[-KEEP_REASONS:]
        job.failures += 1
        if retry and job.failures < MAX_ATTEMPTS:
            self._wait_again(job)
        else:
            self._end(job, "failed")

    def _wait_again(self, job: LiveJob) -> None:
        job.hand_back()
        self.store.update(job)
        self.queues.add(job)
        self.announce(job)

    # -- ending ---------------------------------------------------------------------------------

    def cancel(self, job: LiveJob) -> None:
        """End a job at once; a worker that has it in hand stops at its next step."""
        if job.worker:
            task = CancelTask(job=job.id, stage=job.stage, attempt=job.attempt)
            self.outbox.to_worker(bytes.fromhex(job.worker), task)
        else:
            self.queues.remove(job)
        self._end(job, "cancelled")

    def retry(self, job: LiveJob) -> LiveJob:
        """Queue a failed or cancelled job again, from its last finished stage."""
        if job.state not in ("failed", "cancelled"):
            raise Conflict(f"Job {job.id} is {job.state}.", "Only failed and cancelled jobs can be tried again.")
        self._count(job.state, -1)
        job.state, job.finished, job.failures = "queued", None, 0
        self._count(job.state, +1)
        self._adopt(job)
        self.store.update(job)
        return job

    def _end(self, job: LiveJob, state: JobState) -> None:
        self._move(job, lambda: job.end(state, time.time()))
        if state != "failed":
            self.store.drop("latents", job.id)
        self.store.update(job)
        del self.jobs[job.id]
        same_text = self._by_text[job.text_key]
        same_text.discard(job.id)
        if not same_text:
            del self._by_text[job.text_key]
        log.info("%s", state, extra={"job": job.id})
        self.announce(job)
        self.watchers.forget_job(job.id)

    # -- telling --------------------------------------------------------------------------------

    def announce(self, job: LiveJob) -> None:
        for client in self.watchers.of(job.id):
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
            ahead=0 if running or job.ended else self.queues.ahead_of(job),
            reason=job.reasons[-1] if job.state == "failed" and job.reasons else "",
        )

    def _move(self, job: LiveJob, change: Callable[[], None]) -> None:
        """Change a job's state, keeping the counts."""
        self._count(job.state, -1)
        change()
        self._count(job.state, +1)

    def _count(self, state: JobState, by: int) -> None:
        self.counts[state] = self.counts.get(state, 0) + by
