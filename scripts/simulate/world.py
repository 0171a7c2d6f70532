"""A stack in simulated time: its scheduler is the real one, its GPUs are figures of the plan.

What a worker's task takes follows from what its lease lets it hold; a swap takes its bytes over the link. The world
asks `decide` as the orchestrator does, but only about GPUs where something can change.

Longer than other files: the simulated stack and the two ways that it is compared with use the same costs.
"""

import functools
import heapq
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.job import ModelKey
from orchestrator.memory.lease_sizes import Need
from orchestrator.memory.margins import HEADROOM
from orchestrator.planning.hardware import Card, Hardware
from orchestrator.planning.planner import Plan
from orchestrator.planning.prediction import Book, Terms
from orchestrator.planning.streaming_cost import job_seconds, load_of, streaming
from orchestrator.scheduling.scheduler import decide
from orchestrator.scheduling.snapshot import (
    Assign,
    ChangeLease,
    GpuDemand,
    GpuSpace,
    IdleWorker,
    LeasedWorker,
    Snapshot,
    WaitingTask,
)
from protocol.gpu_memory import GpuId
from protocol.model_profile import ModelProfile, StageProfile
from protocol.stages import STAGES, TRAITS, USUAL_NEXT, Stage

MODEL = ModelKey("m", "bfloat16")
GIVING_BACK = 0.02  # seconds
LATE_FIRST = sorted(STAGES, key=lambda stage: TRAITS[stage].distance)

HOST = "simulated"


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float  # seconds
    cached: bool  # its prompt's embeddings are known


@dataclass(slots=True)
class Tally:
    """The outcome of a trace."""

    waits: list[float] = field(default_factory=list)  # seconds from a job's arrival to its denoiser's first step
    times: list[tuple[float, float]] = field(default_factory=list)  # (arrival, end) of each job
    busy: float = 0.0  # GPU seconds of computing
    swaps: int = 0
    swapping: float = 0.0  # GPU seconds


def task_seconds(profile: StageProfile, card: Card, weights: int, compiled: bool) -> float:
    """Return the seconds of a task with so many bytes for weights."""
    how = streaming(load_of(profile), weights)
    assert how is not None
    compute = profile.flop / card.flops(profile.stage, compiled)
    return job_seconds(compute, profile.passes, how, card.rate.link, profile.together)[1]


@dataclass(slots=True)
class Worker:
    id: str
    stage: Stage
    gpu: GpuId
    need: Need
    holder: LeasedWorker
    job: int | None = None
    since: float = 0.0  # when its lease began
    idle: bool = True

    @property
    def demand(self) -> GpuDemand:
        return self.holder.demands[self.gpu]


class World:
    """The plan's workers at work; every one of them in leases."""

    def __init__(self, plan: Plan, profile: ModelProfile, hardware: Hardware, terms: Terms) -> None:
        self.profile, self.terms = profile, terms
        self.cards = {GpuId(HOST, card.index): card for card in hardware.cards}
        book = Book(profile, hardware, plan.posts, terms)
        self.workers: dict[str, Worker] = {}
        self.on: dict[GpuId, list[Worker]] = {}
        self.available = {GpuId(HOST, card.index): book.left(card) for card in hardware.cards}
        for number, post in enumerate(plan.posts):
            if post.kind != "leases":
                raise ValueError(f"{post.stage} is {post.kind}; only workers in leases are simulated")
            gpu = GpuId(HOST, *post.gpus)
            need = book.need(post, self.cards[gpu])
            name = f"{post.stage}-{number}"
            most = self.available[gpu] - need.least
            holder = LeasedWorker(name, post.stage, MODEL, {gpu: GpuDemand(need)}, lasting=True, most=most)
            worker = self.workers[name] = Worker(name, post.stage, gpu, need, holder)
            self.on.setdefault(gpu, []).append(worker)
        self.free = dict(self.available)
        self.idle: dict[Stage, dict[str, Worker]] = {stage: {} for stage in STAGES}
        for worker in self.workers.values():
            self.idle[worker.stage][worker.id] = worker
        self.queues: dict[Stage, deque[tuple[int, float]]] = {stage: deque() for stage in STAGES}  # (job, since)
        self.tally = Tally()
        self.now = 0.0
        self._events: list[tuple[float, int, Worker | None, ChangeLease | None]] = []
        self._order = itertools.count()
        self._arrivals: Sequence[Arrival] = ()
        self._seconds = functools.cache(self._task_seconds)

    def run(self, arrivals: Sequence[Arrival]) -> Tally:
        """Simulate all arrivals, to the last picture."""
        self._arrivals = arrivals
        coming = iter(enumerate(arrivals))
        following = next(coming, None)
        self._settle(self.on)
        while following or self._events:
            due = self._events[0][0] if self._events else float("inf")
            if following and following[1].at <= due:
                job, arrival = following
                self.now = arrival.at
                stage: Stage = "denoise" if arrival.cached else "text"
                self.queues[stage].append((job, self.now))
                following = next(coming, None)
                self._settle(self._worth_asking())
                continue
            self.now = due
            touched: set[GpuId] = set()
            while self._events and self._events[0][0] == due:
                _, _, worker, lend = heapq.heappop(self._events)
                if worker is not None:
                    touched.add(worker.gpu)
                    self._leased(worker, lend) if lend else self._done(worker)
            self._settle(touched | self._worth_asking())
        return self.tally

    # -- what happens ---------------------------------------------------------------------------

    def _done(self, worker: Worker) -> None:
        job = worker.job
        assert job is not None
        worker.job = None
        self._rest(worker)
        if (following := USUAL_NEXT[worker.stage]) is None:
            self.tally.times.append((self._arrivals[job].at, self.now))
        else:
            self.queues[following].append((job, self.now))

    def _leased(self, worker: Worker, lend: ChangeLease) -> None:
        self.free[worker.gpu] += max(0, worker.demand.lease - lend.bytes)
        worker.since = self.now
        self._hold(worker, lend.bytes, lend.weight_bytes)
        self._rest(worker)

    def _rest(self, worker: Worker) -> None:
        worker.idle = True
        self.idle[worker.stage][worker.id] = worker

    def _hold(self, worker: Worker, size: int, weight_bytes: int) -> None:
        worker.holder = replace(worker.holder, demands={worker.gpu: GpuDemand(worker.need, size, weight_bytes)})

    # -- what next ------------------------------------------------------------------------------

    def _worth_asking(self) -> set[GpuId]:
        """GPUs whose workers could do what waits: those that need no swap first, all others only if they must."""
        found: set[GpuId] = set()
        for stage in LATE_FIRST:
            missing = len(self.queues[stage])
            if not missing:
                continue
            others: list[GpuId] = []
            for worker in self.idle[stage].values():
                if worker.demand.lease - worker.demand.weight_bytes >= worker.need.workspace and worker.demand.lease:
                    found.add(worker.gpu)
                    missing -= 1
                    if not missing:
                        break
                else:
                    others.append(worker.gpu)
            if missing:
                found.update(others)
        return found

    def _settle(self, gpus: "set[GpuId] | dict[GpuId, list[Worker]]") -> None:
        if not gpus:
            return
        here = [worker for gpu in gpus for worker in self.on.get(gpu, ())]
        idle = [IdleWorker(w.id, w.stage, MODEL) for w in here if w.idle]
        if not idle:
            return
        now, count = self.now, len(idle)
        waiting = {
            (stage, MODEL): [
                WaitingTask(str(job), stage, MODEL, TRAITS[stage].distance, self._workspace(stage), now - since)
                for job, since in itertools.islice(queue, count)
            ]
            for stage, queue in self.queues.items()
            if queue
        }
        depth = {(stage, MODEL, TRAITS[stage].distance): len(queue) for stage, queue in self.queues.items()}
        holders = {w.id: self._as_of_now(w) for w in here}
        spaces = {gpu: GpuSpace(self.available[gpu], self.free[gpu]) for gpu in gpus}
        for action in decide(Snapshot(waiting, idle, depth, holders, spaces, self.terms.patience)):
            if isinstance(action, Assign):
                self._assign(action)
            elif isinstance(action, ChangeLease):  # nobody here lends for a moment
                self._lend(action)

    def _workspace(self, stage: Stage) -> int:
        return next(worker.need.workspace for worker in self.workers.values() if worker.stage == stage)

    def _as_of_now(self, worker: Worker) -> LeasedWorker:
        return replace(worker.holder, held=self.now - worker.since)

    def _assign(self, action: Assign) -> None:
        worker, queue = self.workers[action.worker], self.queues[action.stage]
        job = int(action.job)
        at = next(index for index, (waiting, _) in enumerate(queue) if waiting == job)
        del queue[at]
        self._occupy(worker)
        worker.job = job
        seconds = self._seconds(worker.gpu, worker.stage, worker.demand.weight_bytes)
        self.tally.busy += seconds
        if worker.stage == "denoise":
            self.tally.waits.append(self.now - self._arrivals[job].at)
        heapq.heappush(self._events, (self.now + seconds, next(self._order), worker, None))

    def _lend(self, lend: ChangeLease) -> None:
        worker = self.workers[lend.worker]
        self._occupy(worker)
        seconds = GIVING_BACK
        if lend.bytes:
            more = max(0, lend.bytes - worker.demand.lease)
            self.free[worker.gpu] -= more
            assert self.free[worker.gpu] >= 0, "the budget is passed"
            seconds = lend.weight_bytes / self.cards[worker.gpu].rate.link
            self.tally.swaps += 1
            self.tally.swapping += seconds
            self._hold(worker, max(lend.bytes, worker.demand.lease), worker.demand.weight_bytes)
        heapq.heappush(self._events, (self.now + seconds, next(self._order), worker, lend))

    def _occupy(self, worker: Worker) -> None:
        worker.idle = False
        del self.idle[worker.stage][worker.id]

    def _task_seconds(self, gpu: GpuId, stage: Stage, weight_bytes: int) -> float:
        return task_seconds(self.profile.stage(stage), self.cards[gpu], weight_bytes, self.terms.compiled)


# -- how others do it -----------------------------------------------------------------------------


def swap_and_run(profile: ModelProfile, card: Card, stage: Stage, workspace: int, terms: Terms) -> tuple[float, float]:
    """Seconds to bring a stage in alone on a card, beside the contexts of all three, and of its task then."""
    mine = profile.stage(stage)
    weights = min(mine.weights, card.budget - len(STAGES) * (card.rate.context + HEADROOM) - workspace)
    return weights / card.rate.link, task_seconds(mine, card, weights, terms.compiled)


def each_job_by_itself(profile: ModelProfile, hardware: Hardware, terms: Terms, arrivals: Sequence[Arrival]) -> Tally:
    """Each GPU does one whole job after the other, and swaps every stage in for it."""
    tally, costs = Tally(), _costs(profile, hardware, terms)
    free = [(0.0, card.index) for card in hardware.cards]
    for arrival in arrivals:
        start, gpu = heapq.heappop(free)
        at = max(start, arrival.at)
        for stage in STAGES:
            swap, seconds = costs[gpu][stage]
            at += swap
            if stage == "denoise":
                tally.waits.append(at - arrival.at)
            at += seconds
            tally.swaps, tally.swapping, tally.busy = tally.swaps + 1, tally.swapping + swap, tally.busy + seconds
        tally.times.append((arrival.at, at))
        heapq.heappush(free, (at, gpu))
    return tally


def first_come_first_served(
    profile: ModelProfile, hardware: Hardware, terms: Terms, arrivals: Sequence[Arrival]
) -> Tally:
    """Each GPU does whatever task has waited longest, and swaps its stage in unless it is there."""
    tally, costs = Tally(), _costs(profile, hardware, terms)
    inside: dict[int, Stage | None] = dict.fromkeys(costs)
    idle = deque(costs)
    waiting: deque[tuple[int, Stage]] = deque()
    events: list[tuple[float, int, int, int, Stage]] = []  # (at, order, GPU, job, stage)
    order = itertools.count()
    coming: Iterator[tuple[int, Arrival]] = iter(enumerate(arrivals))
    following = next(coming, None)
    while following or events or waiting:
        if events and (not following or events[0][0] <= following[1].at):
            now, _, gpu, job, stage = heapq.heappop(events)
            idle.append(gpu)
            if (next_stage := USUAL_NEXT[stage]) is None:
                tally.times.append((arrivals[job].at, now))
            else:
                waiting.append((job, next_stage))
        elif following:
            job, arrival = following
            now = arrival.at
            waiting.append((job, "denoise" if arrival.cached else "text"))
            following = next(coming, None)
        while idle and waiting:
            job, stage = waiting.popleft()
            gpu = next((gpu for gpu in idle if inside[gpu] == stage), idle[0])
            idle.remove(gpu)
            swap, seconds = costs[gpu][stage]
            if inside[gpu] != stage:
                tally.swaps, tally.swapping = tally.swaps + 1, tally.swapping + swap
                inside[gpu] = stage
            else:
                swap = 0.0
            if stage == "denoise":
                tally.waits.append(now + swap - arrivals[job].at)
            tally.busy += seconds
            heapq.heappush(events, (now + swap + seconds, next(order), gpu, job, stage))
    return tally


def _costs(profile: ModelProfile, hardware: Hardware, terms: Terms) -> dict[int, dict[Stage, tuple[float, float]]]:
    book = Book(profile, hardware, (), terms)
    return {
        card.index: {stage: swap_and_run(profile, card, stage, book.workspace(stage, card), terms) for stage in STAGES}
        for card in hardware.cards
    }
