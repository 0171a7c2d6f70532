"""A job's way through the stages: accepted, handed out, taken back, passed on, ended.

The engine tells `transitions` what has happened, and applies what comes of it: it changes the store and the queues and
fills the outbox. It knows no sockets. Its caller commits the store before it sends what the outbox holds.

Longer than other files, so that all that may happen to a job stands side by side.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator.dispatch import transitions
from orchestrator.dispatch.admission import Admission, Either, Pictures
from orchestrator.dispatch.catalogue import Catalogue
from orchestrator.dispatch.common_stages import CommonStages
from orchestrator.dispatch.counters import Counters
from orchestrator.dispatch.fleet import Fleet, ProcessId, Worker
from orchestrator.dispatch.job_queue import JobQueue
from orchestrator.dispatch.leasing import Leasing
from orchestrator.dispatch.outbox import Outbox
from orchestrator.dispatch.picture_check import fault_of_all, fault_of_last_part, fault_of_part
from orchestrator.dispatch.previews import Previews
from orchestrator.dispatch.quotas import Quotas
from orchestrator.dispatch.retry_delays import RetryDelays
from orchestrator.dispatch.step_deadlines import StepDeadlines
from orchestrator.dispatch.subscriptions import Subscriptions
from orchestrator.dispatch.task_dispatch import TaskDispatch
from orchestrator.dispatch.transitions import Event
from orchestrator.job import LiveJob, ModelKey
from orchestrator.memory.ledger import Account, Ledger
from orchestrator.principal import Principal
from orchestrator.scheduling.fair_shares import FairShares
from orchestrator.settings import OrchestratorSettings
from orchestrator.storage.artifacts import part_name
from orchestrator.storage.job_store import Store
from protocol.errors import Conflict
from protocol.gpu_memory import GpuId
from protocol.job import JobRequest, Kept, StageRecord
from protocol.messages.client import JobEvent
from protocol.messages.common import TaskKey
from protocol.messages.worker import (
    CancelTask,
    Committed,
    Leased,
    Lent,
    Part,
    PreviewFit,
    Progress,
    Ready,
    Result,
    TaskFailed,
)
from protocol.pictures import PICTURES
from protocol.route import WHOLE
from protocol.stages import FIRST, USUAL_NEXT, Stage
from protocol.tensors import CHECKPOINT, Tensor

log = logging.getLogger(__name__)

LOST_NUMBERS = 2  # attempts that a killed orchestrator may have handed out without keeping their numbers
MOST_HANDED_BACK = 10  # tasks of a job that keys' workers may leave undone, before they count as its tries
NO_PICTURES: Pictures = {}


class Engine:
    def __init__(
        self,
        store: Store,
        outbox: Outbox,
        settings: OrchestratorSettings,
        accounts: Mapping[GpuId, Account],
        disk: Path,
        delays: RetryDelays | None = None,
        weight_of: Callable[[Principal], float] = lambda owner: 1.0,
    ) -> None:
        """`weight_of` an owner of jobs says how much of the workers' time it has beside others."""
        self.store, self.outbox, self.settings = store, outbox, settings
        self.fleet, self.subscriptions = Fleet(), Subscriptions()
        self.catalogue = Catalogue(store, settings.models, CommonStages(lambda: self.fleet.elsewhere > 0))
        self.deadlines = StepDeadlines(settings.step_timeout)
        quotas, ledger = Quotas(settings, store, disk), Ledger({**accounts}, store.workspaces())
        self.job_queue = JobQueue(store, quotas, delays or RetryDelays(), FairShares(weight_of), self.catalogue.common)
        self.leasing = Leasing(ledger, self.fleet, self.job_queue.queues, settings.patience, self._keep_alive, store)
        self.admission = Admission(
            store, self.job_queue, quotas, self.leasing, self.catalogue, settings.describer, settings.share_cache
        )
        self.counters = Counters(self._model_name)
        self.previews = Previews(store, outbox, self._vae_of)
        self.dispatch = TaskDispatch(
            store, outbox, self.fleet, self.job_queue, self.leasing, self.happened, self.previews, self.counters
        )
        self._handed_back: Counter[str] = Counter()  # tasks that keys' workers have not done, by unfinished job
        self.drained: set[Stage] = set(json.loads(store.setting("drained") or "[]"))
        for job in store.unfinished():
            # Higher numbers, so that a task of before is told from one of now.
            self._adopt(job._replace(attempts=job.attempts + LOST_NUMBERS))
        if self.job_queue.jobs:
            self.dispatch.hold()

    def _keep_alive(self, worker: Worker) -> float | None:
        return self.catalogue.settings(worker.model).keep_alive.get(worker.hello.stage)

    # -- what has happened to a job -------------------------------------------------------------

    def happened(self, job: LiveJob, event: Event) -> LiveJob:
        """Let an event take effect: stored, queued, counted, and told to those who watch the job."""
        changes = transitions.after(job, event)
        after = changes.job
        self.counters.happened(job, event, after, time.time())
        self.job_queue.replace(job, after)
        for kind in changes.drop:
            self.store.artifacts.drop(kind, after.id)
        if changes.keep == "commit":
            self.store.update(after)
        elif changes.keep == "note":
            self.store.note(after)
        if changes.announce:
            for client, known_as in self.subscriptions.of(after.id).items():
                self.outbox.to_client(client, self.event(after, known_as))
        if after.ended and not job.ended:
            self.leasing.moved()
            self._handed_back.pop(after.id, None)
            self.previews.forget(after.id)
            self.subscriptions.forget_job(after.id)
            log.info("%s", after.state, extra={"job": after.id})
        return after

    def _vae_of(self, job: LiveJob) -> str:
        entry = self.catalogue.of(job.model)
        return (entry.description.vae_digest if entry else "") or job.recipe.revision

    def _model_name(self, job: LiveJob) -> str:
        entry = self.catalogue.of(job.model)
        return entry.name if entry else ""

    def event(self, job: LiveJob, known_as: str) -> JobEvent:
        """A job as it stands, for those who watch it, and know it by some id."""
        running = job.worker is not None
        return JobEvent(
            job=known_as,
            state=job.state,
            running=running,
            step=job.step,
            steps=job.recipe.steps,
            cached=job.cached,
            queue_position=0 if running or job.ended else self.job_queue.queues.ahead_of(job),
            reason=job.reasons[-1] if job.state == "failed" and job.reasons else "",
        )

    # -- workers come and go --------------------------------------------------------------------

    def ready(self, worker: Worker, ready: Ready) -> None:
        """Take a worker as free, unless it names its task; a task that it drops without a word has failed."""
        if worker.task and ready.current_task is None:
            self._not_done(worker, worker.task, f"{worker.hello.name} dropped it", retry=True)
        if worker.owes and ready.current_task is None:
            self.fleet.trust.failed(worker.principal)
        worker.owes = False
        worker.device_map = ready.device_map or worker.device_map
        worker.residency = ready.residency or worker.residency
        worker.context_bytes = ready.context_bytes or worker.context_bytes
        self.leasing.ready(worker, ready)
        self.leasing.moved()
        if reason := self.leasing.hopeless(worker):
            keeping = self.leasing.accounts.keeping(self.leasing.able(*worker.place))
            mended = self.dispatch.start_anew(keeping, f"room for {worker.hello.name}")
            if (
                not mended
                and not self.dispatch.let_another_rest(worker.model)
                and not self.dispatch.beside(worker.model)
            ):
                self._give_up(worker, reason)  # else its jobs wait until others are done, or nothing moves any more
        if ready.current_task is None:
            self.job_queue.seconds.end(worker.id)
            self.fleet.ready(worker)
        else:
            self._claimed(worker, *ready.current_task)

    def _claimed(self, worker: Worker, job_id: str, stage: Stage, attempt: int) -> None:
        """Let a worker that has come back go on with its task, unless another worker has begun it."""
        job = self.job_queue.jobs.get(job_id)
        task = TaskKey(job=job_id, stage=stage, attempt=attempt)
        if job is None or job.worker or (job.stage, worker.hello.stage) != (stage, stage):
            self.fleet.give(worker, task, None)
            self.outbox.to_worker(worker.identity, CancelTask(job=job_id, stage=stage, attempt=attempt))
            return
        log.info("%s goes on with it", worker.hello.name, extra={"job": job_id})
        self.fleet.give(worker, task, StepDeadlines.key(stage, job.recipe))
        self.happened(job, transitions.Claimed(worker.id, attempt))

    def lose_worker(self, worker: Worker, reason: str) -> None:
        """Take out a worker that is gone without a word; its task is tried again.

        What it holds of a GPU counts until its process is known to be gone.
        """
        self._take_out(worker)
        if worker.task:
            self._not_done(worker, worker.task, f"{worker.hello.name} {reason}", retry=True)

    def bury(self, worker: Worker, blameless: bool) -> None:
        """Take out a worker whose process has ended; `blameless` if its task can't have been the cause."""
        if blameless:
            self.dismiss_worker(worker)
        else:
            self.lose_worker(worker, "died")
        self.leasing.buried(worker.process)

    def bury_process(self, host: str, pid: int, blameless: bool) -> None:
        """Take out the workers of a process of the stack's that has ended, and free what it held."""
        process = ProcessId("", host, pid)
        for worker in self.fleet.of_process(process):
            self.bury(worker, blameless)
        self.leasing.buried(process)

    def pids_of(self, host: str) -> set[int]:
        """Return the processes of the stack's on a host that have workers or hold memory."""
        workers = {worker.hello.pid for worker in self.fleet if worker.process[:2] == ("", host)}
        return workers | self.leasing.ghosts(host)

    def _not_done(self, worker: Worker, task: TaskKey, reason: str, retry: bool) -> None:
        """Note that a worker has not done its task. A key's worker costs the job no try where this machine has others.

        But it does after MOST_HANDED_BACK of them: the others may have no room for it. No key's word alone ends a job.
        """
        if worker.process.key:
            retry = True
            self.fleet.trust.failed(worker.principal)
            if self._current(worker, task) is None:
                return
            self._handed_back[task.job] += 1
            others = any(not w.process.key for w in self.leasing.able(*worker.place))
            if others and self._handed_back[task.job] <= MOST_HANDED_BACK:
                log.warning("%s: handed to another", reason, extra={"job": task.job})
                self._hand_back(worker, task)
                return
        self._fail(worker, task, reason, retry)

    def dismiss_worker(self, worker: Worker) -> None:
        """Take out a worker that leaves in good order; its task waits again."""
        self._take_out(worker)
        if worker.task:
            self._hand_back(worker, worker.task)

    def _hand_back(self, worker: Worker, task: TaskKey) -> None:
        """Let a worker's task wait again; nobody is to blame."""
        if job := self._current(worker, task):
            self.happened(job, transitions.HandedBack())

    def _take_out(self, worker: Worker) -> None:
        self.job_queue.seconds.end(worker.id)
        self.fleet.remove(worker)
        self.leasing.left(worker)
        self.leasing.moved()

    def leased(self, worker: Worker, leased: Leased) -> None:
        """Settle a worker's lease; one that it could not take is a failure of the job that waited for it."""
        if not self.leasing.leased(worker, leased):
            self.lose_worker(worker, "answered a lease with another")
            return
        if any(lease.bytes for lease in leased.leases):
            self.counters.swapped(worker.hello.stage)
        self.dispatch.start_anew([w for w in self.leasing.accounts.leaking() if w is worker], f"leaks {worker.id}")
        if leased.reason:
            for job_id in self.job_queue.queues.first_own(worker.hello.stage, worker.model, 1):
                self.dispatch.blame(self.job_queue.jobs[job_id], f"{worker.hello.name}: {leased.reason}", retry=True)
        self.fleet.ready(worker)

    def lent(self, worker: Worker, lent: Lent) -> None:
        if not self.leasing.lent(worker, lent):
            self.lose_worker(worker, "lent more than it has")

    def _give_up(self, worker: Worker, reason: str) -> None:
        """Fail the jobs that a worker can never do, unless another process has workers that do the same."""
        log.error("%s", reason)
        stage, model = worker.hello.stage, worker.model
        if all(w.process == worker.process for w in self.leasing.able(stage, model)):
            queues = self.job_queue.queues
            for job_id in queues.first_own(stage, model, queues.own(stage, model)):  # others' workers may be to come
                self.dispatch.blame(self.job_queue.jobs[job_id], reason, retry=False)

    def fail_waiting(self, model: ModelKey, reason: str) -> None:
        """Fail all jobs of a model that wait."""
        for job in [job for job in self.job_queue.jobs.values() if job.waits and job.model == model]:
            self.dispatch.blame(job, reason, retry=False)

    def drain(self, stage: Stage, on: bool) -> None:
        """Give a stage's workers nothing more to do, until told otherwise; it outlives a restart."""
        (self.drained.add if on else self.drained.discard)(stage)
        self.store.set("drained", json.dumps(sorted(self.drained)))

    # -- accepting and handing out --------------------------------------------------------------

    def accept(
        self, requests: tuple[JobRequest, ...], owner: Principal, pictures: Pictures = NO_PICTURES
    ) -> list[LiveJob]:
        """Accept all of the requests or none; those that are here already count as accepted."""
        jobs, new = self.admission.admit(requests, owner, pictures)
        for job in new:
            self.job_queue.count(job.state, +1)
            self._adopt(job)
        return [self.job_queue.jobs.get(job.id, job) for job in jobs]

    def _adopt(self, job: LiveJob) -> None:
        self.job_queue.add(job)
        self._skip_text_if_known(job)

    def _skip_text_if_known(self, job: LiveJob) -> LiveJob:
        """Skip the text stage where the prompt's embeddings are there."""
        entry = self.catalogue.of(job.model)
        known = entry.routes.get(job.template) if entry else None
        # Where no job has shown it yet, a guess; the worker knows better.
        following: Stage | None = "vae" if job.recipe.images or job.recipe.videos else USUAL_NEXT[FIRST]
        if known and known.following:
            following = known.following
        begins = job.stage == FIRST and not job.records
        if not begins or following is None or not self.store.artifacts.has("text", job.text_key):
            return job
        self.store.artifacts.touch("text", job.text_key)
        return self.happened(job, transitions.EmbeddingsKnown(following))

    def assign(self) -> None:
        """Let the scheduler pair idle workers with waiting tasks and change leases, and send both."""
        if not self.dispatch.is_due(self.drained):
            return
        self.dispatch.assign(self.drained)

    # -- what workers say of their tasks --------------------------------------------------------

    def progress(self, worker: Worker, task: Progress, tensors: tuple[Tensor, ...]) -> None:
        """Note the steps that are done; a checkpoint is kept before anybody hears of them."""
        job = self._current(worker, task)
        if job is None:
            return
        if task.preview:  # of a step that was told of before
            self.previews.came(job, task)
            return
        self.deadlines.moved(worker, job.recipe, task.step)
        saved = 0
        if task.saved > job.saved and tensors and all(tensor.name.startswith(CHECKPOINT) for tensor in tensors):
            self.store.artifacts.put("checkpoint", job.id, tensors)
            saved = task.saved
        self.happened(job, transitions.StepsDone(task.step, saved))

    def preview_fit(self, worker: Worker, fit: PreviewFit, tensors: tuple[Tensor, ...]) -> None:
        """Keep a map from latents to colors that was fitted to a job."""
        if job := self._current(worker, fit):
            self.previews.fitted(worker, job, fit, tensors)

    def part(self, worker: Worker, part: Part, tensors: tuple[Tensor, ...]) -> None:
        """Keep a part of a job's pictures; it is there with the result that comes after it."""
        job = self._current(worker, part)
        if job is None:
            return
        if fault := fault_of_part(job.recipe, part.number, tensors):
            self._not_done(worker, part, f"{worker.hello.name} sent {fault}", retry=True)
            return
        self.store.artifacts.put_part("pictures", job.id, part.number, tensors)

    def result(self, worker: Worker, result: Result, tensors: tuple[Tensor, ...]) -> None:
        """Commit a visit's outcome, once."""
        worker.done += 1
        job = self._current(worker, result)
        self.outbox.to_worker(worker.identity, Committed(job=result.job, stage=result.stage, attempt=result.attempt))
        if job is None:
            log.info("late result of attempt %d dropped", result.attempt, extra={"job": result.job})
            return
        if result.next is None and (fault := self._fault_of_end(job, result, tensors)):
            self._not_done(worker, result, f"{worker.hello.name} ended the job with {fault}", retry=True)
            return
        self.fleet.trust.worked(worker.principal)
        self.job_queue.seconds.done(worker.id)
        if result.alone:
            self.leasing.learn(worker, job.recipe, result.workspace_bytes)
            self.leasing.learn_step_seconds(worker, job.recipe, result.seconds)
        self.deadlines.moved(worker, job.recipe, worker.step + 1)
        kept = self._keep(worker, job, result, tensors)
        record = StageRecord(
            stage=result.stage, worker=worker.hello.name, attempt=result.attempt, seconds=result.seconds,
            peak_bytes=result.peak_bytes, warnings=result.warnings, device_kind=worker.hello.device_kind,
            versions=worker.hello.versions, calls=result.calls, wants=result.wants, kept=kept,
        )  # fmt: skip
        self.counters.streamed(result.stage, streamed_bytes(worker, job))
        self.happened(job, transitions.StageDone(record, result.next, time.time(), result.visits_left))
        if result.next is None:
            self._make_room_for_pictures(job.id)
        elif kept == "text":
            self._share_embeddings(job)

    def _fault_of_end(self, job: LiveJob, result: Result, tensors: tuple[Tensor, ...]) -> str:
        """Return what is wrong with the pictures that end a job; empty if nothing is."""
        artifacts = self.store.artifacts
        parts = artifacts.parts("pictures", job.id)
        if parts != list(range(1, result.parts + 1)):
            return f"{len(parts)} of its {result.parts} parts"
        if fault := fault_of_last_part(tensors):
            return fault
        pictures = next(tensor for tensor in tensors if tensor.name == PICTURES)
        others = [artifacts.specs("pictures", part_name(job.id, number))[0][2] for number in parts]
        return fault_of_all(job.recipe, [pictures.shape, *others])

    def _keep(self, worker: Worker, job: LiveJob, result: Result, tensors: tuple[Tensor, ...]) -> Kept:
        """Keep what a visit leaves, before anybody hears of it; return where."""
        artifacts = self.store.artifacts
        if result.next is None:
            artifacts.put("pictures", job.id, tensors)
            return ""
        if not tensors:
            return ""
        if result.stage == FIRST and not job.records and self._can_be_shared(worker, job, result):
            artifacts.put("text", job.text_key, tensors)
            artifacts.shrink("text", self.settings.embedding_cache, spare=self.job_queue.texts())
            return "text"
        artifacts.put("latents", job.id, tensors)
        return "latents"

    def _can_be_shared(self, worker: Worker, job: LiveJob, result: Result) -> bool:
        """Return whether what a first visit has left is that of the job's text key; what it shows is noted."""
        fits = False
        if (entry := self.catalogue.of(job.model)) and result.next:
            learns = not worker.process.key
            fits = entry.routes.seen(job.template, result.next, result.calls, learns)
        return fits or job.text_key.startswith(WHOLE)

    def _share_embeddings(self, job: LiveJob) -> None:
        for other in self.job_queue.of_text(job.text_key):
            if other.id != job.id and other.waits:
                self._skip_text_if_known(other)

    def _make_room_for_pictures(self, job_id: str) -> None:
        for name in self.store.artifacts.shrink(
            "pictures", self.settings.keep_pictures, spare=Either(self.job_queue.jobs, (job_id,))
        ):
            if job := self.store.job(name):
                self.happened(job, transitions.PicturesDropped())

    def failed(self, worker: Worker, failure: TaskFailed) -> None:
        """Note a failed attempt. One that had too little memory is no failure where more can be had."""
        job, reason = self._current(worker, failure), f"{worker.hello.name}: {failure.reason}"
        if job is None:
            return
        if job.saved and not failure.out_of_memory:
            job = self.happened(job, transitions.CheckpointDropped())  # in case that what it began with is to blame
        if worker.process.key and not failure.out_of_memory:
            self._not_done(worker, failure, reason, retry=True)
        elif failure.cancelled:  # what we cancelled is no longer this worker's; so it was another's mistake
            self.happened(job, transitions.HandedBack())
        elif not failure.out_of_memory:
            self.dispatch.blame(job, reason, failure.retry)
        elif transitions.may_be_short(job) and self.leasing.shortage(worker, job.recipe):
            log.warning("%s had too little memory; it gets more", failure.stage, extra={"job": job.id})
            self.happened(job, transitions.ShortOfMemory())
        else:
            self.dispatch.blame(job, reason, failure.retry and not self.leasing.held(worker))

    def _fail(self, worker: Worker, task: TaskKey, reason: str, retry: bool) -> None:
        if job := self._current(worker, task):
            self.dispatch.blame(job, reason, retry)

    def _current(self, worker: Worker, task: TaskKey) -> LiveJob | None:
        """The job that a worker's message is about, if it has its task and the message is of the present attempt."""
        job = self.job_queue.jobs.get(task.job)
        wanted = (task.job, task.stage, task.attempt)
        return job if job and job.worker == worker.id and (job.id, job.stage, job.attempt) == wanted else None

    # -- what clients want ----------------------------------------------------------------------

    def cancel(self, job: LiveJob) -> None:
        """End a job at once; a worker that has its task stops at its next step."""
        if job.worker:
            task = CancelTask(job=job.id, stage=job.stage, attempt=job.attempt)
            self.outbox.to_worker(bytes.fromhex(job.worker), task)
        self.happened(job, transitions.Cancelled(time.time()))

    def retry(self, job: LiveJob, known_as: str) -> LiveJob:
        """Queue a failed or cancelled job again, from its last visit on; Conflict for any other."""
        if job.state not in ("failed", "cancelled"):
            raise Conflict(f"Job {known_as} is {job.state}.", "Only failed and cancelled jobs can be tried again.")
        return self._skip_text_if_known(self.happened(job, transitions.Retried()))

    def make_again(self, job: LiveJob) -> None:
        """Run a finished job again whose pictures can't be read any more; its recipe gives the same bits."""
        self._skip_text_if_known(self.happened(job, transitions.PicturesLost()))

    def forget_old(self, before: float, limit: int) -> list[LiveJob]:
        """Remove jobs that ended before a moment (seconds since the epoch), the oldest `limit` of them."""
        gone = [job for job in self.store.ended_before(before, limit) if job.id not in self.job_queue.jobs]
        for job in gone:
            self.store.forget(job)
            self.job_queue.count(job.state, -1)
        return gone


def streamed_bytes(worker: Worker, job: LiveJob) -> int:
    """Return about how many bytes of weights a worker has let pass through its GPU for a job: once a pass."""
    missing = sum(max(0, part.total_bytes - part.device_bytes) for part in worker.residency if part.state == "streamed")
    if worker.hello.stage != "denoise":
        return missing
    return missing * job.recipe.steps * (2 if (job.recipe.cfg_scale or 0) > 1 else 1)
