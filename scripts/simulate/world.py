"""A stack in simulated time: its scheduler is the real one, its GPUs are figures of the plan.

What a worker's task takes follows from what its lease lets it hold; a swap takes its bytes over the link. The world
asks `decide` as the orchestrator does, but only about GPUs where something can change, and after each message only once
the orchestrator has had the time that one was measured to take it.

Longer than other files: hosts that go and come are the workers' lives, read beside what workers do.
"""

import functools
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.dispatch.leasing import ALL_SECONDS, FEW_GPUS
from orchestrator.job import ModelKey
from orchestrator.memory.lease_sizes import Need
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.placement import Post
from orchestrator.planning.prediction import Book, Terms
from orchestrator.scheduling.autoscaling import Autoscaler, ScalingTerms, Work, least_busy
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
    far_ahead,
)
from protocol.gpu_memory import GpuId
from protocol.model_profile import ModelProfile
from protocol.stages import STAGES, TRAITS, USUAL_NEXT, Stage
from scripts.simulate.costs import Arrival, Tally, task_seconds
from scripts.simulate.outages import SILENCE, Outage

MODEL = ModelKey("m", "bfloat16")
GIVING_BACK = 0.02  # seconds
LATE_FIRST = sorted(STAGES, key=lambda stage: TRAITS[stage].distance)
MESSAGE_SECONDS = 0.00027  # of the orchestrator for a task and its result: 1,185 jobs/s by one core, 2026-11-27
BEATS = 0.13 / 1000  # of its core for each worker that there is, on the same machine
ON_THE_WAY = 0.011  # seconds for 16 MB of tensors through CURVE, twice
STEPS = 28  # of a denoising job: its checkpoints
A_FEW = 4  # GPUs that are looked at in turns beside many, fewer than the orchestrator does: it has the time
TICK = 1.0  # seconds between two looks of what scales


@dataclass(slots=True)
class Worker:
    id: str
    stage: Stage
    gpu: GpuId
    host: int
    need: Need
    holder: LeasedWorker
    job: int | None = None
    begun: float = 0.0  # its task, and how long it takes
    seconds: float = 0.0
    since: float = 0.0  # when its lease began
    idle: bool = True
    life: int = 0  # counts up whenever it is missed

    @property
    def demand(self) -> GpuDemand:
        return self.holder.demands[self.gpu]


@dataclass(slots=True)
class Host:
    workers: list[Worker] = field(default_factory=list)
    known: bool = False  # to the orchestrator, as working
    busy: int = 0  # workers with a task
    dead: bool = False
    cut_until: float = 0.0
    cordoned: bool = False
    starting: bool = False
    let_go: bool = False  # by what scales


class World:
    """The workers of a plan's posts, every one of them in leases. Of `gpus` each host has so many."""

    def __init__(
        self, posts: Sequence[Post], profile: ModelProfile, hardware: Hardware, terms: Terms, gpus: int = 0,
        outages: Sequence[Outage] = (), scaling: ScalingTerms | None = None,
    ) -> None:  # fmt: skip
        self.profile, self.terms = profile, terms
        each = self._each = gpus or len(hardware.cards)
        where = {card.index: GpuId(f"host-{card.index // each}", card.index) for card in hardware.cards}
        self.cards = {where[card.index]: card for card in hardware.cards}
        book = Book(profile, hardware, posts, terms)
        self.workers: dict[str, Worker] = {}
        self.on: dict[GpuId, list[Worker]] = {}
        self.hosts = [Host() for _ in range(-(-len(hardware.cards) // each))]
        self.available = {where[card.index]: book.left(card) for card in hardware.cards}
        self._workspaces: dict[Stage, int] = {}
        for number, post in enumerate(posts):
            if post.kind != "leases":
                raise ValueError(f"{post.stage} is {post.kind}; only workers in leases are simulated")
            (index,) = post.gpus
            gpu = where[index]
            need = book.need(post, self.cards[gpu])
            name = f"{post.stage}-{number}"
            most = self.available[gpu] - need.least
            holder = LeasedWorker(name, post.stage, MODEL, {gpu: GpuDemand(need)}, lasting=True, most=most)
            worker = self.workers[name] = Worker(name, post.stage, gpu, index // each, need, holder)
            self.hosts[worker.host].workers.append(worker)
            self._workspaces.setdefault(post.stage, need.workspace)
        self.free = dict(self.available)
        self.idle: dict[Stage, dict[str, Worker]] = {stage: {} for stage in STAGES}
        self.queues: dict[Stage, deque[tuple[int, float]]] = {stage: deque() for stage in STAGES}  # (job, since)
        self.tally = Tally()
        self.now = 0.0
        self._free_at = 0.0  # when the orchestrator has heard of all that it was told
        self._left: dict[int, float] = {}  # of jobs that were interrupted, the share of their denoising that is left
        self._open = 0  # jobs that are not done
        self._touched: set[GpuId] = set()
        self._all_due, self._turn = 0.0, 0
        self._in_turns = FEW_GPUS if len(self.cards) <= FEW_GPUS else A_FEW
        self._events: list[tuple[float, int, bool, Callable[[], None]]] = []
        self._order = itertools.count()
        self._arrivals: Sequence[Arrival] = ()
        self._ahead = far_ahead(len(self.workers))
        self._seconds = functools.cache(self._task_seconds)
        self._scaler = Autoscaler(scaling) if scaling else None
        for number, host in enumerate(self.hosts):
            if not scaling or number < scaling.least:
                self._join(host)
        if self._scaler:
            self._at(0.0, self._scale, message=False)
        for outage in outages:
            self._at(outage.begin, functools.partial(self._begin, outage), message=False)
        self._pay()

    def run(self, arrivals: Sequence[Arrival]) -> Tally:
        """Simulate all arrivals, to the last picture."""
        self._arrivals, self._open = arrivals, len(arrivals)
        coming = iter(enumerate(arrivals))
        following = next(coming, None)
        while self._open:
            due = self._events[0][0] if self._events else float("inf")
            self.now = max(self.now, min(due, following[1].at if following else due))
            while following and following[1].at <= self.now:
                job, arrival = following
                self._hear()
                self.queues["denoise" if arrival.cached else "text"].append((job, arrival.at))
                following = next(coming, None)
            while self._events and self._events[0][0] <= self.now:
                _, _, message, happen = heapq.heappop(self._events)
                if message:
                    self._hear()
                happen()
            self._settle()
        return self.tally

    def _at(self, when: float, happen: Callable[[], None], message: bool = True) -> None:
        heapq.heappush(self._events, (when, next(self._order), message, happen))

    def _hear(self) -> None:
        """Have the orchestrator take a message in: what comes meanwhile waits for it."""
        self._free_at = max(self._free_at, self.now) + MESSAGE_SECONDS / (1 - BEATS * len(self.workers))
        self.now = self._free_at

    # -- what workers do ------------------------------------------------------------------------

    def _reached(self, worker: Worker, life: int, happen: Callable[[], None]) -> None:
        """Let something of a worker's happen, unless it was missed; over a link that is cut, once that is healed."""
        host = self.hosts[worker.host]
        if life != worker.life or host.dead:
            return
        if host.cut_until > self.now:
            self._at(host.cut_until, functools.partial(self._reached, worker, life, happen))
            return
        self._touched.add(worker.gpu)
        happen()

    def _later(self, worker: Worker, seconds: float, happen: Callable[[], None]) -> None:
        begun = max(self.now, self.hosts[worker.host].cut_until)
        self._at(begun + seconds, functools.partial(self._reached, worker, worker.life, happen))

    def _done(self, worker: Worker) -> None:
        job = worker.job
        assert job is not None
        worker.job = None
        self._rest(worker)
        if (following := USUAL_NEXT[worker.stage]) is None:
            self.tally.times.append((self._arrivals[job].at, self.now))
            self._left.pop(job, None)
            self._open -= 1
        else:
            self.queues[following].append((job, self.now))

    def _leased(self, worker: Worker, lend: ChangeLease) -> None:
        self.free[worker.gpu] += max(0, worker.demand.lease - lend.bytes)
        worker.since = self.now
        self._hold(worker, lend.bytes, lend.weight_bytes)
        self._rest(worker)

    def _rest(self, worker: Worker) -> None:
        host = self.hosts[worker.host]
        host.busy -= not worker.idle
        worker.idle = True
        if not host.cordoned:
            self.idle[worker.stage][worker.id] = worker

    def _hold(self, worker: Worker, size: int, weight_bytes: int) -> None:
        worker.holder = replace(worker.holder, demands={worker.gpu: GpuDemand(worker.need, size, weight_bytes)})

    # -- hosts that go and come -----------------------------------------------------------------

    def _begin(self, outage: Outage) -> None:
        host = self.hosts[outage.host]
        if not host.known:
            return
        host.dead, host.cut_until = outage.kind == "down", outage.end
        if outage.noticed:
            lives = [worker.life for worker in host.workers]
            self._at(self.now + SILENCE, functools.partial(self._miss, host, lives, self.now), message=False)
            self._at(outage.back, functools.partial(self._come_back, host), message=False)
            host.let_go = False

    def _miss(self, host: Host, lives: list[int], silent: float) -> None:
        """Take a host for gone, unless it is by now: its jobs go on elsewhere, from the checkpoints that had come."""
        if not host.known or lives != [worker.life for worker in host.workers]:
            return
        for worker in host.workers:
            if (job := worker.job) is not None:
                done = min(1.0, max(0.0, silent - worker.begun) / worker.seconds)
                kept = int(done * STEPS) / STEPS if worker.stage == "denoise" else 0.0
                self.tally.busy -= worker.seconds * (1 - done)
                self.tally.again += worker.seconds * (done - kept)
                self._left[job] = self._left.get(job, 1.0) * (1 - kept)
                self.queues[worker.stage].appendleft((job, self.now))
        self._part(host)

    def _part(self, host: Host) -> None:
        host.known, host.busy = False, 0
        for worker in host.workers:
            worker.life += 1
            worker.job, worker.idle = None, True
            self.idle[worker.stage].pop(worker.id, None)
            self._hold(worker, 0, 0)
            self.free[worker.gpu] = self.available[worker.gpu]
            self.on.pop(worker.gpu, None)

    def _come_back(self, host: Host) -> None:
        host.dead, host.cut_until = False, 0.0
        if not host.known and not host.let_go and not host.starting:
            self._join(host)

    def _join(self, host: Host) -> None:
        host.starting = False
        if host.known:
            return
        host.known, host.cordoned, host.let_go = True, False, False
        for worker in host.workers:
            self.on.setdefault(worker.gpu, []).append(worker)
            self.idle[worker.stage][worker.id] = worker
            self._touched.add(worker.gpu)

    # -- as many hosts as are wanted --------------------------------------------------------------

    def _scale(self) -> None:
        assert self._scaler
        here = [host for host in self.hosts if host.known]
        starting = [host for host in self.hosts if host.starting]
        waiting = sum(self._left.get(job, 1.0) for job, _ in self.queues["denoise"]) + len(self.queues["text"])
        work = Work(waiting * self._alone, [self._busy(host) for host in here], len(starting))
        wanted = self._scaler.wanted(work, self.now) - len(here) - len(starting)
        cordoned = [host for host in here if host.cordoned]
        if wanted >= 0:
            for host in cordoned:
                self._cordon(host, False)
        able = [h for h in self.hosts if not h.known and not h.starting and not h.dead and h.cut_until <= self.now]
        for host in able[: max(0, wanted)]:
            host.starting = True
            self._at(self.now + self._scaler.terms.start_seconds, functools.partial(self._join, host), message=False)
        for _ in range(max(0, -wanted - len(cordoned))):
            open_ones = [host for host in here if not host.cordoned]
            self._cordon(open_ones[least_busy([self._busy(host) for host in open_ones])], True)
        for host in here:
            if host.cordoned and not host.busy:
                host.let_go = True
                self._part(host)
        self._pay()
        self._at(self.now + TICK, self._scale, message=False)

    @property
    def _alone(self) -> float:
        """Seconds of a denoising job on a GPU of its own."""
        worker = next(worker for worker in self.workers.values() if worker.stage == "denoise")
        return self._seconds(
            worker.gpu, "denoise", min(worker.need.weights, self.available[worker.gpu] - worker.need.workspace)
        )

    def _busy(self, host: Host) -> int:
        return min(self._each, host.busy)

    def _cordon(self, host: Host, cordoned: bool) -> None:
        host.cordoned = cordoned
        for worker in host.workers:
            if cordoned:
                self.idle[worker.stage].pop(worker.id, None)
            elif worker.idle:
                self.idle[worker.stage][worker.id] = worker

    def _pay(self) -> None:
        count = sum(host.known or host.starting for host in self.hosts)
        if not self.tally.hosts or self.tally.hosts[-1][1] != count:
            self.tally.hosts.append((self.now, count))

    # -- what next ------------------------------------------------------------------------------

    def _worth_asking(self) -> Iterable[GpuId]:
        """GPUs whose workers could do what waits: those that need no swap first, others only if they must.

        Of many others some in turns, and all of them now and then, as the orchestrator looks at them.
        """
        found: set[GpuId] = set()
        everything = self.now >= self._all_due
        if everything:
            self._all_due = self.now + ALL_SECONDS
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
            if missing and (everything or len(others) <= self._in_turns):
                found.update(others)
            elif missing:
                self._turn = (self._turn + self._in_turns) % len(others)
                found.update((others[self._turn :] + others)[: self._in_turns])
        return found

    def _settle(self) -> None:
        gpus = {gpu for gpu in self._touched.union(self._worth_asking()) if gpu in self.on}
        self._touched.clear()
        here = [worker for gpu in gpus for worker in self.on[gpu]]
        idle = [IdleWorker(w.id, w.stage, MODEL) for w in here if w.idle and not self.hosts[w.host].cordoned]
        if not idle:
            return
        now, count = self.now, len(idle)
        waiting = {
            (stage, MODEL): [
                WaitingTask(str(job), stage, MODEL, TRAITS[stage].distance, self._workspaces[stage], now - since)
                for job, since in itertools.islice(queue, count)
            ]
            for stage, queue in self.queues.items()
            if queue
        }
        depth = {(stage, MODEL, TRAITS[stage].distance): len(queue) for stage, queue in self.queues.items()}
        holders = {w.id: replace(w.holder, held=now - w.since) for w in here}
        spaces = {gpu: GpuSpace(self.available[gpu], self.free[gpu]) for gpu in gpus}
        snapshot = Snapshot(waiting, idle, depth, holders, spaces, self.terms.patience, self._ahead)
        for action in decide(snapshot):
            if isinstance(action, Assign):
                self._assign(action)
            elif isinstance(action, ChangeLease):  # nobody here lends for a moment
                self._lend(action)

    def _assign(self, action: Assign) -> None:
        worker, queue = self.workers[action.worker], self.queues[action.stage]
        job = int(action.job)
        at = next(index for index, (waiting, _) in enumerate(queue) if waiting == job)
        del queue[at]
        self._occupy(worker)
        left = self._left.get(job, 1.0) if worker.stage == "denoise" else 1.0
        seconds = self._seconds(worker.gpu, worker.stage, worker.demand.weight_bytes) * left
        worker.job, worker.begun, worker.seconds = job, self.now, seconds
        self.tally.busy += seconds
        if worker.stage == "denoise" and left == 1.0:
            self.tally.waits.append(self.now - self._arrivals[job].at)
        self._later(worker, seconds + ON_THE_WAY, functools.partial(self._done, worker))

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
        self._later(worker, seconds, functools.partial(self._leased, worker, lend))

    def _occupy(self, worker: Worker) -> None:
        worker.idle = False
        self.hosts[worker.host].busy += 1
        self.idle[worker.stage].pop(worker.id, None)

    def _task_seconds(self, gpu: GpuId, stage: Stage, weight_bytes: int) -> float:
        return task_seconds(self.profile.stage(stage), self.cards[gpu], weight_bytes, self.terms.compiled)
