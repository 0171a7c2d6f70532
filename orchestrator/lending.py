"""Between the engine and the scheduler: what workers need, hold and are lent of their GPUs."""

import math
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace

from orchestrator.experience import pace_key
from orchestrator.fleet import Fleet, Worker
from orchestrator.ledger import Holding, Ledger
from orchestrator.live import LiveJob, ModelKey
from orchestrator.queues import StageQueues
from orchestrator.scheduler import Assign, Holder, Lend, Room, Snapshot, WaitingTask, decide
from orchestrator.store import Store
from protocol.errors import DoesNotFit
from protocol.jobs import STAGES, ModelDescription, Recipe, Stage
from protocol.messages import Lease, Leased, Ready, WorkerHello
from protocol.units import format_bytes

SHORTER = 0.99  # of the shortest that a step took, before it is worth remembering


class Lending:
    """`keep_alive` is in seconds by stage, none for ever; `store` keeps what is learned."""

    def __init__(
        self,
        ledger: Ledger,
        fleet: Fleet,
        queues: StageQueues,
        patience: float,
        keep_alive: Mapping[Stage, float],
        store: Store,
    ) -> None:
        self.ledger, self._fleet, self._queues = ledger, fleet, queues
        self._patience, self._keep_alive = patience, keep_alive
        self._remember, self._remember_pace = store.remember_workspace, store.remember_pace
        self._paces: dict[str, float] = {}  # seconds a step

    # -- workers come, and go -------------------------------------------------------------------

    def ready(self, worker: Worker, ready: Ready) -> None:
        """A worker that works in leases has joined, with what it holds; or has done a task."""
        gpu = worker.hello.gpu
        if gpu is not None and gpu in self.ledger.accounts and ready.needs:
            holding = Holding(gpu, ready.needs, ready.context_bytes, lease=ready.lease_bytes, share=ready.lease_weights)
            self.ledger.join(worker.id, holding)
            worker.lease_bytes = ready.lease_bytes
        else:
            self.ledger.has_worked(worker.id, ready.context_bytes)

    def hopeless(self, worker: Worker) -> str:
        """Why a worker can never do anything; empty if it can."""
        holding = self.ledger.holdings.get(worker.id)
        if holding is None or self.ledger.most_workspace(worker.id) >= 0:
            return ""
        return (
            f"{worker.hello.stage} takes at least {format_bytes(holding.needs.least)} of GPU memory; the budget of GPU "
            f"{holding.gpu} leaves {format_bytes(max(0, self.ledger.available(holding.gpu)))} beside contexts"
        )

    def left(self, worker: Worker) -> None:
        """What it holds counts until its process is known to have ended."""
        self.ledger.orphan(worker.id, ghost(worker.hello))

    def buried(self, host: str, pid: int) -> None:
        self.ledger.leave(f"{host}/{pid}")

    # -- what next ------------------------------------------------------------------------------

    def decide(self, jobs: Mapping[str, LiveJob], drained: Container[Stage] = ()) -> list[Assign | Lend]:
        """The scheduler's decision; drivers are asked only where memory is to be lent.

        Only GPUs with an idle worker are looked at: nothing can be lent or taken back on others.
        """
        idle = [worker for worker in self._fleet.idle() if worker.stage not in drained]
        if not idle:
            return []
        holdings = self.ledger.holdings
        holders = self._holders({holdings[worker.id].gpu for worker in idle if worker.id in holdings})
        places = {(worker.stage, worker.model) for worker in idle} | {(h.stage, h.model) for h in holders}
        waiting = {place: self._first(*place, len(idle), holders, jobs) for place in places}
        by_id = {holder.id: holder for holder in holders}
        gpus = {holder.gpu for holder in holders}
        rooms = {gpu: Room(self.ledger.available(gpu), self.ledger.booked_free(gpu)) for gpu in gpus}
        snapshot = Snapshot(waiting, idle, self._queues.depth, by_id, rooms, self._patience)
        actions = decide(snapshot)
        if any(isinstance(action, Lend) and action.bytes for action in actions):
            rooms = {gpu: Room(room.available, self.ledger.free(gpu)) for gpu, room in rooms.items()}
            actions = decide(replace(snapshot, gpus=rooms))
        return actions

    def _holders(self, gpus: Container[int]) -> list[Holder]:
        now = time.monotonic()
        found: list[Holder] = []
        for worker in self._fleet:
            holding = self.ledger.holdings.get(worker.id)
            if holding is None or holding.gpu not in gpus:
                continue
            stage, keep = worker.hello.stage, self._keep_alive.get(worker.hello.stage)
            found.append(
                Holder(
                    id=worker.id, stage=stage, model=worker.model, gpu=holding.gpu,
                    need=self.ledger.need(worker.id, stage, worker.model), lease=holding.booked,
                    share=holding.booked if holding.asked else holding.share, held=now - holding.since,
                    lasting=keep is None and not worker.refused,
                    expired=keep is not None and worker.state == "idle" and now - worker.idle_since >= keep,
                    most=max(0, self.ledger.most_workspace(worker.id)),
                )
            )  # fmt: skip
        return found

    def _first(
        self, stage: Stage, model: ModelKey, count: int, holders: Iterable[Holder], jobs: Mapping[str, LiveJob]
    ) -> Sequence[WaitingTask]:
        now = time.monotonic()
        roomiest = self._roomiest(stage, model, holders)
        return [
            WaitingTask(job, stage, model, self._workspace(jobs[job].recipe, roomiest), now - jobs[job].queued)
            for job in self._queues.first(stage, model, count)
        ]

    def _roomiest(self, stage: Stage, model: ModelKey, holders: Iterable[Holder]) -> Holder | None:
        """Of those that do a stage's tasks, the one with the most room beside its weights."""
        able = [holder for holder in holders if (holder.stage, holder.model) == (stage, model)]
        return max(able, key=lambda holder: holder.most or 0, default=None)

    def _workspace(self, recipe: Recipe, roomiest: Holder | None) -> int:
        """At most what can be had at all: a VAE makes do with it, and a denoiser shows whether it is enough."""
        if roomiest is None:
            return 0
        needs = self.ledger.holdings[roomiest.id].needs
        wanted = self.ledger.workspace(roomiest.stage, roomiest.model, recipe, needs)
        return min(wanted, max(0, self.ledger.most_workspace(roomiest.id)))

    # -- leases ---------------------------------------------------------------------------------

    def lend(self, worker: Worker, lend: Lend) -> Lease:
        """Book it; the message to be sent."""
        self.ledger.lend(worker.id, lend.bytes, lend.weights)
        self._fleet.swap(worker)
        return Lease(bytes=lend.bytes, weights=lend.weights)

    def leased(self, worker: Worker, leased: Leased) -> bool:
        """A worker has done what its lease said; False if it has none."""
        if worker.id not in self.ledger.holdings:
            return False
        self.ledger.settled(worker.id, leased.bytes, leased.weights, leased.kept_bytes)
        worker.lease_bytes, worker.refused = leased.bytes, bool(leased.reason)
        worker.residency, worker.context_bytes = leased.residency or worker.residency, leased.context_bytes
        return True

    def more(self, worker: Worker) -> bool:
        """Whether a task that finds too little memory in this worker's lease could have more, here or elsewhere."""
        holding = self.ledger.holdings.get(worker.id)
        if holding is None:
            return False
        place = (worker.hello.stage, worker.model)
        able = [w.id for w in self._fleet if (w.hello.stage, w.model) == place and w.id in self.ledger.holdings]
        return max(map(self.ledger.most_workspace, able)) > holding.lease - holding.share

    # -- what tasks take ------------------------------------------------------------------------

    def learn(self, worker: Worker, recipe: Recipe, workspace: int) -> None:
        """What a task has taken beside the weights, in bytes."""
        if workspace > 0 and worker.id in self.ledger.holdings:
            key = self.ledger.learn(worker.hello.stage, worker.model, recipe, workspace)
            if key:
                self._remember(key, workspace)

    def learn_pace(self, worker: Worker, recipe: Recipe, seconds: float) -> None:
        """What a task has taken; the first one of a process counts for nothing."""
        account = self.ledger.accounts.get(-1 if worker.hello.gpu is None else worker.hello.gpu)
        if account and worker.done > 1 and seconds > 0:
            steps = recipe.steps if worker.hello.stage == "denoise" else 1
            key = pace_key(worker.hello.stage, recipe, account.name)
            if seconds / steps < SHORTER * self._paces.get(key, math.inf):
                self._paces[key] = seconds / steps
                self._remember_pace(key, seconds / steps)

    def shortage(self, worker: Worker, recipe: Recipe) -> bool:
        """A task has found too little; whether another try will find more."""
        more = self.more(worker)
        if more:
            self.learn(worker, recipe, self.ledger.after_shortage(worker.id))
        return more

    def refuse_what_never_fits(self, recipe: Recipe, model: ModelDescription) -> None:
        """By what stages are known to take; DoesNotFit names the largest size of that shape that fits."""
        key = ModelKey.of_recipe(recipe)
        for stage in STAGES:
            workers = [worker for worker in self._fleet if worker.hello.stage == stage and worker.model == key]
            reasons = [self.hopeless(worker) for worker in workers]
            if workers and all(reasons):
                raise DoesNotFit(f"{reasons[0]}.", "Give its GPU a larger --budget, or choose another GPU or the CPU.")
        denoisers = [worker.id for worker in self._fleet if worker.hello.stage == "denoise" and worker.model == key]
        if not denoisers or any(worker not in self.ledger.holdings for worker in denoisers):
            return
        wanted = self.ledger.certain("denoise", key, recipe)
        most = max(self.ledger.most_workspace(worker) for worker in denoisers)
        if wanted <= most:
            return
        scale, multiple = math.sqrt(max(0, most) / wanted), model.size_multiple
        width, height = (max(1, int(side * scale) // multiple) * multiple for side in (recipe.width, recipe.height))
        raise DoesNotFit(
            f"{recipe.width}x{recipe.height}, {recipe.num_images} a job, needs about {format_bytes(wanted)} "
            f"of GPU memory beside the denoiser's weights; {format_bytes(most)} can be had.",
            f"About {width}x{height} fits; or fewer pictures a job, or a larger budget for the denoiser's GPU.",
        )


def ghost(hello: WorkerHello) -> str:
    """Under which a process holds memory that has left the stack, but may not have ended."""
    return f"{hello.host}/{hello.pid}"
