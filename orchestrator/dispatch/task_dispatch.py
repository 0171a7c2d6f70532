"""Handing out: what the scheduler decides is sent to workers; what stands still is ended, with its reason."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import replace

from orchestrator.dispatch import transitions
from orchestrator.dispatch.counters import Counters
from orchestrator.dispatch.fleet import Fleet, Worker
from orchestrator.dispatch.job_queue import JobQueue
from orchestrator.dispatch.leasing import Leasing
from orchestrator.dispatch.outbox import Outbox
from orchestrator.dispatch.previews import Previews
from orchestrator.dispatch.step_deadlines import StepDeadlines
from orchestrator.dispatch.transitions import Event
from orchestrator.job import LiveJob, ModelKey
from orchestrator.principal import kept_name
from orchestrator.scheduling.snapshot import Assign, ChangeLease, ReturnLoan, TakeLoan
from orchestrator.storage.job_store import Store
from protocol.job import Recipe
from protocol.messages.worker import AHEAD, MOST_AHEAD, MOST_PROMPTS, Task
from protocol.pictures import as_given
from protocol.speedups import batch_of
from protocol.stages import TRAITS, Stage
from protocol.tensors import Tensor
from protocol.wire import MAX_TENSORS

log = logging.getLogger(__name__)

REST_SECONDS = 30.0  # that a model may take to rest, with its processes killed at the latest then
MOST_WAITING = 64  # jobs that are looked through for what a worker may do along with another
MOST_BESIDE = MAX_TENSORS // 2  # tensors of other jobs beside a task
MOST_TEXT = 20_000  # characters of one of those jobs: a message's header holds all their recipes
WAITING_SECONDS = 0.25  # between two decisions that the time alone may change, while tasks wait
PARTLY_SECONDS = 0.02  # where the last decision was about some of the workers that might do it
IDLE_SECONDS = 1.0  # and while none do: what is free of GPUs changes outside of the stack, and keep-alives end
HOLD_SECONDS = 1.0  # after a restart, for workers to come back and name their tasks
MEMORY_HINT = "a smaller picture, fewer a job, a larger --budget, another GPU or --device cpu for a stage would help"


def length_of(recipe: Recipe) -> int:
    """Return the characters of what a person has written into a recipe."""
    settings = sum(len(str(value)) for _, value in recipe.settings)
    return len(recipe.prompt) + len(recipe.negative_prompt or "") + settings


def may_go_along(job: LiveJob) -> bool:
    """Return whether a job may be done along with another: it begins with nothing but words, and has not failed."""
    bare = not (job.recipe.pictures or job.saved or job.failures or job.shortages)
    return bare and length_of(job.recipe) <= MOST_TEXT


def kind_of(job: LiveJob) -> tuple[object, ...]:
    """Return what jobs have in common that are denoised in a batch: all but prompts and seeds."""
    recipe = job.recipe.model_copy(update={"prompt": "", "negative_prompt": None, "seed": 0})
    return recipe, job.recipe.negative_prompt is None, [(record.stage, record.kept) for record in job.records]


class TaskDispatch:
    """`happened` lets an event of a job take effect, and returns what the job is then."""

    def __init__(
        self,
        store: Store,
        outbox: Outbox,
        fleet: Fleet,
        job_queue: JobQueue,
        leasing: Leasing,
        happened: Callable[[LiveJob, Event], LiveJob],
        previews: Previews,
        counters: Counters,
    ) -> None:
        self._store, self._outbox, self._fleet = store, outbox, fleet
        self._job_queue, self._leasing, self._happened = job_queue, leasing, happened
        self._previews, self._counters = previews, counters
        self._hold_until = 0.0  # monotonic seconds
        self._seen: object = None  # all that a decision depends on, as of the last one, but for the time
        self.clock: Callable[[], float] = time.monotonic
        self._look_again = 0.0  # seconds of the clock, when the time alone may change it
        self._rest_ends = math.inf  # monotonic seconds, when a key's workers may work again
        self.to_restart: list[str] = []  # names of workers to be started anew, for no fault of a job's
        self._restarted: set[tuple[str, str]] = set()  # (worker, why) of those that were told so
        self.to_rest: list[ModelKey] = []  # models that others need the GPU memory of
        self._told_to_rest: dict[str, float] = {}  # monotonic seconds when, by the ids of their workers

    def hold(self) -> None:
        """Hand out nothing for a moment."""
        self._hold_until = time.monotonic() + HOLD_SECONDS

    def next_due(self) -> float | None:
        """Monotonic seconds when `assign` will have something to do, if nothing comes before; None if nothing will."""
        times = [self._hold_until] if time.monotonic() < self._hold_until else []
        times += [self._look_again] if self._leasing.partly and len(self._job_queue.queues) else []
        times += [due for due in (self._job_queue.next_due(), self._fleet.trust.next_due()) if due is not None]
        return min(times, default=None)

    def is_due(self, drained: Collection[Stage]) -> bool:
        """Return whether anything may have changed since the last decision, so that there may be another."""
        self._job_queue.end_delays()
        now, queues = time.monotonic(), self._job_queue.queues
        if now < self._hold_until:
            return False
        changes = queues.changes, self._fleet.changes, self._leasing.ledger.changes, frozenset(drained)
        if changes == self._seen and self.clock() < self._look_again and now < self._rest_ends:
            return False
        self._seen, rest_ends = changes, self._fleet.trust.next_due()
        self._look_again = self.clock() + (WAITING_SECONDS if len(queues) else IDLE_SECONDS)
        self._rest_ends = math.inf if rest_ends is None else rest_ends
        return True

    def assign(self, drained: Container[Stage]) -> None:
        """Let the scheduler pair idle workers with waiting tasks and change leases, and send both."""
        begun = time.perf_counter()
        actions = self._leasing.decide(self._job_queue.jobs, drained)
        self._counters.decided(time.perf_counter() - begun)
        if self._leasing.partly:
            self._look_again = min(self._look_again, self.clock() + PARTLY_SECONDS)
        if self._leasing.standing:
            self._end_standstill(self._leasing.standing)
            return  # which has changed what there is to decide
        busy = {action.job for action in actions if isinstance(action, Assign)}
        for action in actions:
            worker = self._fleet.workers[bytes.fromhex(action.worker)]
            match action:
                case Assign():
                    self._hand_out(self._job_queue.jobs[action.job], worker, busy)
                case ChangeLease():
                    self._outbox.to_worker(worker.identity, self._leasing.lend(worker, action))
                case TakeLoan():
                    self._outbox.to_worker(worker.identity, self._leasing.borrow(worker, action))
                case ReturnLoan():
                    self._outbox.to_worker(worker.identity, self._leasing.return_loan(worker, action))

    def _hand_out(self, job: LiveJob, worker: Worker, busy: set[str]) -> None:
        tensors = self._inputs(job)
        if tensors is None:
            log.warning("an artifact of the visit before %s is gone; going back", job.stage, extra={"job": job.id})
            self._happened(job, transitions.InputLost())
            return
        pictures = self._pictures(job)
        if pictures is None:
            self.blame(job, "a picture that it begins from is gone; submit it again", retry=False)
            return
        checkpoint = self._store.artifacts.get("checkpoint", job.id) if job.saved and TRAITS[job.stage].resumes else ()
        if checkpoint is None:
            job = self._happened(job, transitions.CheckpointDropped())
        job = self._happened(job, transitions.HandedOut(worker.id))
        self._leasing.moved()
        ahead = self._ahead(job, busy) if not (pictures or checkpoint) else []
        task = Task(
            job=job.id, stage=job.stage, attempt=job.attempt, recipe=job.recipe,
            ahead=tuple(other.recipe for other, _ in ahead), allow_tiling=not self._leasing.more(worker),
            learn_previews=self._previews.learns(job),
        )  # fmt: skip
        theirs = [replace(t, name=f"{AHEAD}{n}:{t.name}") for n, (_, tensors) in enumerate(ahead) for t in tensors]
        along = tuple(other.id for other, _ in ahead)
        self._fleet.give(worker, task, StepDeadlines.key(job.stage, job.recipe), along)
        self._outbox.to_worker(worker.identity, task, (*tensors, *pictures, *(checkpoint or ()), *theirs))
        self._previews.handed_out(job)

    def _ahead(self, job: LiveJob, busy: set[str]) -> Sequence[tuple[LiveJob, tuple[Tensor, ...]]]:
        """Return the next jobs, but for `busy` ones, that their worker may do along with this one, with their inputs.

        Text encoders take prompts that were not seen, a denoiser jobs of the same kind, as many as it makes batches of.
        """
        batch = batch_of(job.recipe.speedups) if job.stage == "denoise" else 1
        first_visit = job.stage == "text" and not job.records
        if not (first_visit or batch > 1) or job.failures or job.shortages:  # its company may have been their cause
            return []
        taken = self._fleet.taken_along() | busy
        waiting = (self._job_queue.jobs[id] for id in self._job_queue.queues.first(job.stage, job.model, MOST_WAITING))
        fresh = [other for other in waiting if other.id not in taken and may_go_along(other)]
        if first_visit:
            others = {o.text_key: o for o in fresh if not o.records and o.text_key != job.text_key}
            return [(other, ()) for other in others.values()][:MOST_PROMPTS]
        kind = kind_of(job)
        alike = [other for other in fresh if kind_of(other) == kind][: min(batch - 1, MOST_AHEAD)]
        found = [(other, inputs) for other in alike if (inputs := self._inputs(other)) is not None]
        sums = itertools.accumulate(len(inputs) for _, inputs in found)
        return [pair for pair, total in zip(found, sums, strict=True) if total <= MOST_BESIDE]

    def _inputs(self, job: LiveJob) -> tuple[Tensor, ...] | None:
        """Return what the visit before has left; None where it is gone or damaged."""
        match job.records[-1].kept if job.records else "":
            case "text":
                return self._store.artifacts.get("text", job.text_key)
            case "latents":
                return self._store.artifacts.get("latents", job.id)
        return ()

    def _pictures(self, job: LiveJob) -> list[Tensor] | None:
        """Return the pictures that a job begins from, named for its worker; None where one is gone."""
        found: dict[str, Tensor] = {}
        for digest in job.recipe.pictures:
            artifacts = self._store.artifacts
            kept = artifacts.get("input", kept_name(job.owner, digest))
            kept = kept or artifacts.get("input", digest)  # of a job of an earlier release's
            if kept is None:
                return None
            found[digest] = kept[0]
        return as_given(job.recipe.named_pictures, found)

    def blame(self, job: LiveJob, reason: str, retry: bool) -> None:
        """Let a job's attempt fail, or its wait for one."""
        log.warning("%s failed: %s", job.stage, reason, extra={"job": job.id})
        self._happened(job, transitions.Failed(reason, retry, time.time()))

    # -- where nothing moves --------------------------------------------------------------------

    def _end_standstill(self, job_ids: Sequence[str]) -> None:
        """End a standstill: start workers anew that keep memory, or let another model rest.

        Else the first tasks fail, with the reason.
        """
        self._leasing.moved()
        firsts = [self._job_queue.jobs[job_id] for job_id in job_ids]
        accounts = self._leasing.accounts
        able = {job.id: self._leasing.able(job.stage, job.model) for job in firsts}
        if any(self.start_anew(accounts.keeping(able[job.id]), f"{job.stage} {job.id}") for job in firsts):
            return
        if any(self.let_another_rest(job.model) for job in firsts):
            return
        for job in firsts:
            self.blame(job, f"{accounts.account(able[job.id], job)}; {MEMORY_HINT}", retry=False)

    def beside(self, model: ModelKey) -> list[Worker]:
        """Return the workers of other models on a model's GPUs."""
        here = [worker for worker in self._fleet if not worker.process.key]
        gpus = {gpu for worker in here if worker.model == model for gpu in worker.gpus}
        return [worker for worker in here if worker.model != model and gpus & {*worker.gpus}]

    def let_another_rest(self, model: ModelKey) -> bool:
        """Have a model rest whose processes are on a model's GPUs and have no job: the one that had none for longest.

        Once each time that it is there; return whether there is one, or one is about to go.
        """
        now, here = time.monotonic(), [worker for worker in self._fleet if not worker.process.key]
        beside = self.beside(model)
        self._told_to_rest = {w.id: self._told_to_rest[w.id] for w in here if w.id in self._told_to_rest}
        if any(now - self._told_to_rest.get(worker.id, -REST_SECONDS) < REST_SECONDS for worker in beside):
            return True
        idle = [w for w in beside if not self._job_queue.by_model[w.model] and w.id not in self._told_to_rest]
        if not idle:
            return False
        since = {other: max(w.idle_since for w in idle if w.model == other) for other in {w.model for w in idle}}
        other = min(since, key=lambda one: since[one])
        self._told_to_rest |= {w.id: now for w in here if w.model == other}
        log.info("model %s is to rest: another one finds too little GPU memory beside it", other.revision)
        self.to_rest.append(other)
        return True

    def start_anew(self, workers: Iterable[Worker], why: str) -> bool:
        """Have processes replaced that keep memory which they should have given back; no job is to blame.

        Once each for the same reason `why`; return whether there was any.
        """
        names = [worker.hello.name for worker in workers if not worker.process.key]
        fresh = [name for name in names if (name, why) not in self._restarted]
        for name in fresh:
            self._restarted.add((name, why))
            log.warning("%s keeps GPU memory that it should have given back; it is started anew", name)
            self.to_restart.append(name)
        return bool(fresh)
