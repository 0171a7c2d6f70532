"""The link between the engine and the scheduler: what workers need, hold and are lent of their GPUs.

Longer than other files: which GPUs a decision is about, and all that it sees of them, are read beside each other.
"""

import math
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

from orchestrator.dispatch.fleet import Fleet, ProcessId, Worker
from orchestrator.dispatch.memory_accounts import MemoryAccounts
from orchestrator.dispatch.stage_queues import StageQueues
from orchestrator.dispatch.standstill import TICK_SECONDS, Busy, Standstill
from orchestrator.job import LiveJob, ModelKey
from orchestrator.memory.lease_sizes import KEPT_BETWEEN_STEPS
from orchestrator.memory.ledger import Holding, Ledger
from orchestrator.memory.task_keys import step_key
from orchestrator.scheduling.scheduler import decide, startable
from orchestrator.scheduling.snapshot import (
    NOTHING,
    Action,
    ChangeLease,
    GpuDemand,
    GpuSpace,
    IdleWorker,
    LeasedWorker,
    Place,
    ReturnLoan,
    Snapshot,
    TakeLoan,
    WaitingTask,
    far_ahead,
    slots_ahead,
)
from orchestrator.storage.job_store import Store
from protocol.errors import DoesNotFit
from protocol.gpu_memory import GpuId
from protocol.job import Recipe
from protocol.messages.worker import Borrow, Leased, Lent, Ready, Returned, SetLease
from protocol.model import ModelDescription
from protocol.stages import STAGES, TRAITS, Stage
from protocol.units import format_bytes

JUDGED_ALIKE_SECONDS = 0.25  # that what can be had of GPUs counts as the same
FEW_GPUS = 32  # with idle workers, up to which all are looked at in each decision
ALL_SECONDS = 2.0  # between two looks at all
IN_TURNS = 16  # GPUs
LEAST_SEEN = 16  # tasks of a place, of which the first may be too large for the workers that are idle
LESS = 0.9  # of a loan that a worker could not give
SHORTER = 0.99  # of the shortest that a step took, before it is worth remembering


class Leasing:
    """`keep_alive` gives a worker's, in seconds, None for ever; `store` keeps what is learned."""

    def __init__(
        self,
        ledger: Ledger,
        fleet: Fleet,
        queues: StageQueues,
        patience: float,
        keep_alive: Callable[[Worker], float | None],
        store: Store,
    ) -> None:
        self.ledger, self._fleet, self._queues = ledger, fleet, queues
        self._patience, self._keep_alive = patience, keep_alive
        self._remember, self._remember_step_seconds = store.remember_workspace, store.remember_step_seconds
        self._paces: dict[str, float] = {}  # seconds a step
        self._standstill = Standstill()
        self._leased_places: set[Place] = set()  # where some worker has ever worked in leases
        self._judged: dict[ModelKey, tuple[object, tuple[DoesNotFit | None, int | None]]] = {}
        self.accounts = MemoryAccounts(ledger, fleet)
        self.standing: list[str] = []  # first jobs of those that wait in vain, as of the last decision
        self.partly = False  # there are GPUs that decisions have not been about yet, and that may help
        self._looked = self._all_due = 0.0  # monotonic seconds of the last one, and of the next about all
        self._moved = 0.0  # monotonic seconds when a task last came nearer to its end
        self._not_looked_at = math.inf  # GPUs, since something was done
        self._turn = 0

    # -- workers come, and go -------------------------------------------------------------------

    def ready(self, worker: Worker, ready: Ready) -> None:
        """Book what a worker that works in leases holds as it joins; or its contexts, after a task, and new needs."""
        gpus, jobs = worker.gpus, worker.hello.parts
        if ready.needs and not ready.device_map and self.ledger.wants(worker.id, ready.needs):
            self.ledger.has_worked(worker.id, ready.context_bytes)
        elif ready.needs and len(ready.needs) == len(set(gpus)) == len(gpus) and self.ledger.accounts.keys() >= {*gpus}:
            contexts = ready.context_bytes if len(ready.context_bytes) == len(gpus) else (0,) * len(gpus)
            leases = ready.leases if len(ready.leases) == len(gpus) else (NOTHING,) * len(gpus)
            kept = ready.kept_bytes if len(ready.kept_bytes) == len(gpus) else (0,) * len(gpus)
            rows = zip(gpus, ready.needs, contexts, leases, kept, strict=True)
            holdings = [
                Holding(gpu, needs, context, lease=lease.bytes, weight_bytes=lease.weight_bytes, kept=left, jobs=jobs)
                for gpu, needs, context, lease, left in rows
            ]
            self.ledger.join(worker.id, holdings)
            self._leased_places.add(worker.place)
            worker.lendable_bytes = ready.lendable_bytes
            if ready.lent_bytes and self.ledger.lent(worker.id, ready.lent_bytes):
                self._fleet.lent(worker, ready.lent_bytes)
            self._note_lease(worker)
        else:
            self.ledger.has_worked(worker.id, ready.context_bytes)

    def hopeless(self, worker: Worker) -> str:
        """Return why a worker can never do anything; empty if it can."""
        for holding in self.ledger.holdings.get(worker.id, ()):
            room = self.ledger.available(holding.gpu)
            if room < holding.needs.least:
                least = format_bytes(holding.needs.least)
                return (
                    f"{worker.hello.stage} takes at least {least} of GPU memory; the budget of GPU {holding.gpu} "
                    f"leaves {format_bytes(max(0, room))} beside contexts"
                )
        return ""

    def left(self, worker: Worker) -> None:
        """Count what a worker that has left holds, until its process is known to have ended."""
        self.ledger.orphan(worker.id, ghost(worker.process))

    def buried(self, process: ProcessId) -> None:
        self.ledger.leave(ghost(process))

    def ghosts(self, host: str) -> set[int]:
        """Return the numbers of a host's processes that have left the stack, but may hold memory."""
        start = ghost(ProcessId("", host, 0)).removesuffix("0")
        return {int(name.removeprefix(start)) for name in self.ledger.holdings if name.startswith(start)}

    # -- what next ------------------------------------------------------------------------------

    def decide(self, jobs: Mapping[str, LiveJob], drained: Container[Stage] = ()) -> list[Action]:
        """The scheduler's decision; drivers are asked only where memory is to be lent.

        Only GPUs with an idle worker are looked at: nothing can be lent or taken back on others.
        """
        self.standing = []
        idle, all_of_them = self._worth_looking_at(self._fleet.idle(self._worth_a_look), drained)
        if not idle and not self._fleet.lenders:
            return []
        snapshot = self._snapshot(idle, jobs, drained)
        actions = decide(snapshot)
        if actions:
            self._not_looked_at = math.inf
        if any(map(takes_more, actions)):
            with self.ledger.as_measured(snapshot.gpus):
                actions = decide(self._snapshot(idle, jobs, drained))
        if all_of_them and snapshot.holders and any(snapshot.waiting.values()):
            places = self._standstill.look(snapshot, actions, self._busy())
            self.standing = [job for place in places for job in stuck(snapshot, place)[:1]]
        return actions

    def _worth_a_look(self, place: Place) -> int | None:
        """Return how many of a place's idle workers matter: all that work in leases, of others as many as tasks wait.

        So the cost of a decision is that of what can be done, whatever the number of workers.
        """
        return None if place in self._leased_places else self._queues.at(*place)

    def _worth_looking_at(self, idle: list[IdleWorker], drained: Container[Stage]) -> tuple[Sequence[IdleWorker], bool]:
        """Return the idle workers that a decision is about, and whether that is all of them.

        Beside few GPUs it is. Beside many it is all of them now and then, more often where nothing moves, and else
        those where something has changed, and in turns some of those that could do what waits.
        """
        now, since, holdings = time.monotonic(), self._looked, self.ledger.holdings
        there: dict[GpuId, list[IdleWorker]] = {}
        for worker in idle:
            for holding in holdings.get(worker.holder, ()):
                there.setdefault(holding.gpu, []).append(worker)
        self._looked, self.partly = now, False
        if len(there) <= FEW_GPUS or now >= self._all_due:
            self._all_due = now + (TICK_SECONDS if now - self._moved >= ALL_SECONDS else ALL_SECONDS)
            return idle, True
        workers = self._fleet.workers
        chosen = {gpu for gpu in there if self.ledger.touched.get(gpu, 0.0) >= since}
        chosen |= {gpu for gpu, some in there.items() for w in some if workers[bytes.fromhex(w.id)].idle_since >= since}
        can_help: dict[GpuId, None] = {}
        wanted = {place: self._startable(place, drained) for place in {(w.stage, w.model) for w in idle}}
        for gpu, some in there.items():
            for worker in some:
                place = worker.stage, worker.model
                if wanted[place] > 0 and holdings[worker.holder][0].lease:
                    wanted[place] -= 1
                    chosen.add(gpu)
                elif wanted[place] > 0:
                    can_help[gpu] = None
        others = [gpu for gpu in can_help if gpu not in chosen]
        self._turn = (self._turn + IN_TURNS) % max(1, len(others))
        chosen.update((others[self._turn :] + others)[:IN_TURNS])
        self._not_looked_at = min(self._not_looked_at, len(others)) - IN_TURNS
        self.partly = self._not_looked_at > 0
        chosen = self.ledger.together(chosen)
        return [w for w in idle if not any(h.gpu not in chosen for h in holdings.get(w.holder, ()))], False

    def _startable(self, place: Place, drained: Container[Stage]) -> int:
        """Return how many of a place's tasks may start, for all that is known without looking at them."""
        stage, _ = place
        if stage in drained:
            return 0
        depth, ahead, total = self._queues.depth, self._far_ahead(), 0
        for model in self._queues.common.models(*place):
            slots = slots_ahead(WaitingTask("", stage, model, TRAITS[stage].distance), depth, ahead)
            total += max(0, min(self._queues.own(stage, model), slots))
        return total

    def _far_ahead(self) -> Mapping[Stage, int]:
        return far_ahead(len(self._fleet.workers))

    def _snapshot(self, idle: Sequence[IdleWorker], jobs: Mapping[str, LiveJob], drained: Container[Stage]) -> Snapshot:
        """Return all as it is, but for the tasks of drained stages, whose workers give their memory to others."""
        holders = self._holders(self.accounts.concerned({worker.holder for worker in idle} | self._lenders()))
        common = self._queues.common
        places = {common.place(w.stage, w.model) for w in idle} | {common.place(h.stage, h.model) for h in holders}
        most = max(len(idle), LEAST_SEEN)
        waiting = {place: self._first(*place, most, holders, jobs) for place in places if place[0] not in drained}
        gpus = {gpu for holder in holders for gpu in holder.demands}
        here, ledger = {worker.id for gpu in gpus for worker in self._on(gpu)}, self.ledger
        spaces = {g: GpuSpace(ledger.available(g), ledger.free(g), ledger.passing(g, here)) for g in gpus}
        by_id = {holder.id: holder for holder in holders}
        return Snapshot(
            waiting, idle, self._queues.depth, by_id, spaces, self._patience, self._far_ahead(), common.places
        )

    def _lenders(self) -> set[str]:
        return {worker.id for worker in self._fleet.lenders if worker.loan == "given"}

    def _busy(self) -> Busy:
        """Return the workers that work, and those whose leases are being changed, now."""
        firsts = [(worker, first) for worker in self._fleet if (first := self._fleet.first(worker))]
        return Busy(
            {first.id for worker, first in firsts if worker.state == "busy"},
            {first.id for worker, first in firsts if worker.state == "swapping" or worker.loan},
            {self.place(worker) for worker in self._fleet if worker.state == "busy"},
        )

    def place(self, worker: Worker) -> Place:
        """Return the place of the tasks that a worker does: where models share a stage, that of all of them."""
        return self._queues.common.place(*worker.place)

    def moved(self) -> None:
        """Note that a task came nearer to its end, or that a worker came or went."""
        self._standstill.moved()
        self._moved, self._not_looked_at = time.monotonic(), math.inf

    def _on(self, gpu: GpuId) -> Iterator[Worker]:
        """Yield the workers that hold something of a GPU, but for those that have left."""
        workers = self._fleet.workers
        found = (workers.get(bytes.fromhex(name)) for name in self.ledger.on(gpu) if "/" not in name)
        return (worker for worker in found if worker)

    def _holders(self, gpus: Iterable[GpuId]) -> list[LeasedWorker]:
        now = time.monotonic()
        found: list[LeasedWorker] = []
        there = {worker.identity: worker for gpu in gpus for worker in self._on(gpu)}
        for worker in sorted(there.values(), key=lambda worker: worker.joined):
            holdings = self.ledger.holdings[worker.id]
            demands = {holding.gpu: self._demand(worker, holding) for holding in holdings}
            stage, keep = worker.hello.stage, self._keep_alive(worker)
            resting = self._fleet.resting_since(worker)
            idle_for = 0.0 if resting is None else now - resting
            found.append(
                LeasedWorker(
                    id=worker.id, stage=stage, model=worker.model, jobs=worker.hello.parts,
                    demands=demands,
                    held=now - max(holding.since for holding in holdings),
                    lasting=keep is None and worker.refused is None, refused=worker.refused,
                    expired=keep is not None and resting is not None and idle_for >= keep,
                    most=max(0, self.ledger.most_workspace(worker.id)),
                    lendable=self._lendable(worker, holdings[0], demands[holdings[0].gpu]), loan=holdings[0].loan,
                    lent_for=now - worker.lent_at if worker.loan == "given" else 0.0,
                    back_for=now - worker.called_back_at, busy=worker.state == "busy", idle_for=idle_for,
                )
            )  # fmt: skip
        return found

    def _lendable(self, worker: Worker, holding: Holding, demand: GpuDemand) -> int:
        """Return the bytes that a worker can lend: of weights what it has told, and workspace that rests."""
        if not demand.need.lends or worker.state not in ("idle", "busy"):
            return 0
        resting = int((holding.lease - holding.weight_bytes) * (1 - KEPT_BETWEEN_STEPS))
        able = worker.lendable_bytes + resting
        return able if worker.refused_loan is None else min(able, int(worker.refused_loan * LESS))

    def _demand(self, worker: Worker, holding: Holding) -> GpuDemand:
        need = self.ledger.need(worker.id, holding, worker.hello.stage, worker.model)
        return GpuDemand(need, holding.booked, holding.booked if holding.asked else holding.weight_bytes)

    def _first(
        self, stage: Stage, model: ModelKey, count: int, holders: Iterable[LeasedWorker], jobs: Mapping[str, LiveJob]
    ) -> Sequence[WaitingTask]:
        roomiest = self._roomiest(stage, model, holders)
        taken = self._fleet.taken_along()
        most = count + len(taken)
        found = dict.fromkeys([id for id in self._queues.first(stage, model, most) if id not in taken][:count])
        models = self._queues.common.models(stage, model)
        for one in models if len(models) > 1 else ():  # none hides the others' tasks behind those that can't start
            found.update(dict.fromkeys([i for i in self._queues.first_own(stage, one, most) if i not in taken][:count]))
        return [self._waiting(jobs[job_id], roomiest) for job_id in found]

    def _waiting(self, job: LiveJob, roomiest: LeasedWorker | None) -> WaitingTask:
        waited = time.monotonic() - self._queues.since(job.id)
        return WaitingTask(job.id, job.stage, job.model, job.distance, self._workspace(job.recipe, roomiest), waited)

    def _roomiest(self, stage: Stage, model: ModelKey, holders: Iterable[LeasedWorker]) -> LeasedWorker | None:
        """Return the worker of a stage with the most room beside its weights."""
        place = self._queues.common.place
        able = [holder for holder in holders if place(holder.stage, holder.model) == place(stage, model)]
        return max(able, key=lambda holder: holder.most or 0, default=None)

    def _workspace(self, recipe: Recipe, roomiest: LeasedWorker | None) -> int:
        """Cap a task's workspace at what can be had: a VAE makes do with it, a denoiser shows whether it is enough."""
        if roomiest is None:
            return 0
        needs = max((h.needs for h in self.ledger.holdings[roomiest.id]), key=lambda needs: needs.workspace)
        wanted = self.ledger.workspace(roomiest.stage, roomiest.model, recipe, needs)
        return min(wanted, max(0, self.ledger.most_workspace(roomiest.id)))

    # -- leases ---------------------------------------------------------------------------------

    def lend(self, worker: Worker, lend: ChangeLease) -> SetLease:
        """Book a lease; return the message to be sent."""
        self.ledger.lend(worker.id, lend.leases)
        self._fleet.swap(worker)
        return SetLease(leases=lend.leases)

    def borrow(self, worker: Worker, loan: TakeLoan) -> Borrow:
        """Book that a worker is asked to lend; return the message to be sent."""
        self.ledger.borrow(worker.id, loan.bytes)
        self._fleet.borrow(worker)
        return Borrow(bytes=loan.bytes)

    def lent(self, worker: Worker, lent: Lent) -> bool:
        """Book what a worker has lent; return False for more than it has."""
        asked = next((holding.loan.bytes for holding in self.held(worker) if holding.loan), 0)
        if not self.ledger.lent(worker.id, lent.bytes):
            return False
        if asked and not lent.bytes:
            worker.refused_loan = min(asked, worker.refused_loan or asked)
        self._fleet.lent(worker, lent.bytes)
        self._note_lease(worker)
        return True

    def return_loan(self, worker: Worker, action: ReturnLoan) -> Returned:
        """Book that a worker has again what it lent; return the message to be sent."""
        size = self.ledger.return_loan(worker.id, action.missing)
        self._fleet.return_loan(worker, self._patience)
        self._note_lease(worker)
        return Returned(bytes=size)

    def _note_lease(self, worker: Worker) -> None:
        """Note what a worker may use now, for those who look at it."""
        worker.lease_bytes = tuple(holding.booked for holding in self.ledger.holdings[worker.id])

    def leased(self, worker: Worker, leased: Leased) -> bool:
        """Settle a worker's lease by its answer; return False if that is not what it was told."""
        holdings = self.ledger.holdings.get(worker.id, ())
        asked = tuple(holding.asked or NOTHING for holding in holdings)
        nothing = (NOTHING,) * len(holdings)
        if not holdings or leased.leases not in (asked, nothing) or len(leased.kept_bytes) not in (0, len(holdings)):
            return False
        if leased.reason:
            size = sum(lease.bytes for lease in asked)
            worker.refused = min(size, worker.refused or size)
        self.ledger.settled(worker.id, leased.leases, leased.kept_bytes)
        self._note_lease(worker)
        worker.residency, worker.context_bytes = leased.residency or worker.residency, leased.context_bytes
        worker.lendable_bytes = leased.lendable_bytes
        if any(lease.bytes for lease in leased.leases):
            worker.refused_loan = None  # what stood in its way may have been of the lease before
        return True

    def more(self, worker: Worker) -> bool:
        """Return whether a task that finds too little memory in a worker's lease could have more, here or elsewhere."""
        holdings = self.held(worker)
        if not holdings:
            return False
        able = [w.id for w in self.able(*worker.place) if w.id in self.ledger.holdings]
        return max(map(self.ledger.most_workspace, able)) > min(holding.room for holding in holdings)

    def able(self, stage: Stage, model: ModelKey) -> list[Worker]:
        """Return the workers that do a model's tasks of a stage."""
        place = self._queues.common.place(stage, model)
        return [worker for worker in self._fleet if self.place(worker) == place]

    def held(self, worker: Worker) -> Sequence[Holding]:
        """Return what the process of a worker holds; nothing where it works in memory of its own."""
        first = self._fleet.first(worker)
        return self.ledger.holdings.get(first.id, ()) if first else ()

    # -- what tasks take ------------------------------------------------------------------------

    def learn(self, worker: Worker, recipe: Recipe, workspace: int) -> None:
        """Remember the bytes that a task has taken beside the weights, for all models that share the stage."""
        if workspace <= 0 or not self.held(worker):
            return
        for model in self._queues.common.models(*worker.place):
            if key := self.ledger.learn(worker.hello.stage, model, recipe, workspace):
                self._remember(key, workspace)

    def learn_step_seconds(self, worker: Worker, recipe: Recipe, seconds: float) -> None:
        """Remember the seconds that a task has taken; the first one of a process counts for nothing."""
        account = self.ledger.accounts.get(worker.gpus[0]) if len(worker.gpus) == 1 else None
        if account and worker.done > 1 and seconds > 0:
            steps = recipe.steps if worker.hello.stage == "denoise" else 1
            key = step_key(worker.hello.stage, recipe, account.name)
            if seconds / steps < SHORTER * self._paces.get(key, math.inf):
                self._paces[key] = seconds / steps
                self._remember_step_seconds(key, seconds / steps)

    def shortage(self, worker: Worker, recipe: Recipe) -> bool:
        """Learn from a task that found too little memory; return whether another try will find more."""
        first, more = self._fleet.first(worker), self.more(worker)
        if more and first:
            self.learn(worker, recipe, self.ledger.after_shortage(first.id))
        return more

    def _most_had(self, key: ModelKey) -> tuple[DoesNotFit | None, int | None]:
        """Return why no worker of a stage of a model can ever do anything, and the most bytes for a denoising task.

        None: nothing keeps them from it; no denoiser, or one that works in memory of its own, sets a limit. All jobs of
        a submission are judged by it, so that it is found once for a moment.
        """
        moment = self._fleet.changes, self.ledger.changes, int(time.monotonic() / JUDGED_ALIKE_SECONDS)
        if self._judged.get(key, (None,))[0] != moment:
            self._judged[key] = moment, self._find_most(key)
        return self._judged[key][1]

    def _find_most(self, key: ModelKey) -> tuple[DoesNotFit | None, int | None]:
        beside: dict[GpuId, int] = {}  # bytes that other models' contexts take, which may rest
        for other in self._fleet:
            if other.model != key and not other.process.key:
                for holding in self.ledger.holdings.get(other.id, ()):
                    beside[holding.gpu] = beside.get(holding.gpu, 0) + holding.overhead
        processes = [worker for worker in self._fleet if worker.model == key and not worker.hello.part]
        freed = {worker.id: min((beside.get(gpu, 0) for gpu in worker.gpus), default=0) for worker in processes}
        for stage in STAGES:
            reasons = [self.hopeless(worker) for worker in processes if worker.hello.stage == stage]
            if reasons and all(reasons) and not any(freed.values()):
                return DoesNotFit(
                    f"{reasons[0]}.", "Give its GPU a larger --budget, or choose another GPU or the CPU."
                ), None
        denoisers = [worker.id for worker in processes if worker.hello.stage == "denoise"]
        if not denoisers or any(worker not in self.ledger.holdings for worker in denoisers):
            return None, None
        return None, max(self.ledger.most_workspace(worker) + freed[worker] for worker in denoisers)

    def refuse_what_never_fits(self, recipe: Recipe, model: ModelDescription) -> None:
        """Judge by what stages are known to take; DoesNotFit names the largest size of that shape that fits."""
        key = ModelKey.of_recipe(recipe)
        refusal, most = self._most_had(key)
        if refusal:
            raise refusal
        if most is None:
            return
        wanted = self.ledger.certain("denoise", key, recipe)
        if wanted <= max(0, most):  # contexts alone may take more than there is
            return
        scale, multiple = math.sqrt(max(0, most) / wanted), model.size_multiple
        width, height = (max(1, int(side * scale) // multiple) * multiple for side in (recipe.width, recipe.height))
        raise DoesNotFit(
            f"{recipe.width}x{recipe.height}, {recipe.num_images} a job, needs about {format_bytes(wanted)} "
            f"of GPU memory beside the denoiser's weights; {format_bytes(most)} can be had.",
            f"About {width}x{height} fits; or fewer pictures a job, or a larger budget for the denoiser's GPU.",
        )


def stuck(snapshot: Snapshot, place: Place) -> list[str]:
    """Return the jobs of a place that could start if there were room, but for those whose own worker is to come yet."""
    there = {holder.model for holder in snapshot.at(place)}
    return [task.job for task in startable(snapshot.waiting[place], snapshot, {}) if task.model in there]


def takes_more(action: Action) -> bool:
    return isinstance(action, ReturnLoan) or (isinstance(action, ChangeLease) and action.bytes > 0)


def ghost(process: ProcessId) -> str:
    """Return the name under which a process that has left the stack, but may not have ended, holds memory."""
    return "/".join(map(str, process))
