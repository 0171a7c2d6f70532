"""Who does what next: a pure function of a snapshot. No sockets, clocks or disks; the same code serves simulations.

The snapshot need not hold every waiting task, only the first of each queue: as many as there are idle workers.

A stage may have many workers, on GPUs of any size. A task goes to whoever is free and has room for it; where nobody is
in, one comes in where that displaces least. Who lies on several GPUs comes in on all of them, or on none.

Where workers of a GPU must take turns, the one that is in goes on until its queue is empty, unless another's task and
its own turn have lasted for longer than `patience`. Nobody is sent away where there is room. Who streams more than
needed gets more room, where several tasks wait for him and nobody else wants it. What fits beside all others for good
comes in before there is work.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.job import ModelKey
from orchestrator.memory.lease_sizes import LeaseSize, Need, lease_sizes
from protocol.gpu_memory import GpuId, Lease
from protocol.stages import STAGES, Stage

# How far a stage may run ahead of the next, in jobs waiting there: finished embeddings (4 MB each for FLUX.1) must
# not pile up on disk while the denoiser works through them.
AHEAD: dict[Stage, int] = {"text": 64, "denoise": 256}
WORTH_A_SWAP = 0.1  # of a worker's weights in place, more than before
NOTHING = Lease(bytes=0, weight_bytes=0)


@dataclass(frozen=True, slots=True)
class WaitingTask:
    job: str
    stage: Stage
    model: ModelKey
    workspace: int = 0  # bytes of GPU memory that it takes beside the weights, or as many as anybody can have
    waited: float = 0.0  # seconds at this stage


@dataclass(frozen=True, slots=True)
class IdleWorker:
    id: str
    stage: Stage
    model: ModelKey
    of: str = ""  # the holder, where a process is several workers that have one lease

    @property
    def holder(self) -> str:
        return self.of or self.id


@dataclass(frozen=True, slots=True)
class GpuDemand:
    """What a worker takes and has of a GPU."""

    need: Need  # its workspace being that of the largest task that it has done, for all its jobs at once
    lease: int = 0  # bytes; while one is being changed, the larger of both
    weight_bytes: int = 0  # of it for weights


@dataclass(frozen=True, slots=True)
class LeasedWorker:
    """A worker that works in leases, idle or not."""

    id: str
    stage: Stage
    model: ModelKey
    demands: Mapping[GpuId, GpuDemand]  # by GPU
    jobs: int = 1  # at once: it is so many workers
    held: float = 0.0  # seconds since it has that lease
    expired: bool = False  # it has been idle for longer than its weights are to be kept
    lasting: bool = False  # its weights may come before there is work, and stay
    most: int | None = None  # bytes of workspace that it can ever have; None: whatever a task takes
    refused: int | None = None  # bytes of the smallest lease that it could not take

    @property
    def lease(self) -> int:
        return sum(demand.lease for demand in self.demands.values())

    @property
    def weights(self) -> int:
        return sum(demand.need.weights for demand in self.demands.values())

    def covers(self, task: WaitingTask) -> bool:
        space = task.workspace * self.jobs
        return all(demand.lease > 0 and space <= demand.lease - demand.weight_bytes for demand in self.demands.values())

    def can_ever(self, task: WaitingTask) -> bool:
        return self.most is None or task.workspace <= self.most


@dataclass(frozen=True, slots=True)
class GpuSpace:
    """Bytes of a GPU's budget beside all contexts, and those of them in no lease."""

    available: int
    free: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`waiting` and `idle` in the order in which they should be served; `depth` counts all that wait at a stage."""

    waiting: Mapping[tuple[Stage, ModelKey], Sequence[WaitingTask]]
    idle: Sequence[IdleWorker]
    depth: Mapping[Stage, int]
    holders: Mapping[str, LeasedWorker] = field(default_factory=dict)  # by id
    gpus: Mapping[GpuId, GpuSpace] = field(default_factory=dict)
    patience: float = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class Assign:
    job: str
    stage: Stage
    worker: str


@dataclass(frozen=True, slots=True)
class ChangeLease:
    """What a worker may use from now on of each of its GPUs."""

    worker: str
    leases: tuple[Lease, ...]

    @property
    def bytes(self) -> int:
        """0 where it is to give back everything."""
        return sum(lease.bytes for lease in self.leases)

    @property
    def weight_bytes(self) -> int:
        return sum(lease.weight_bytes for lease in self.leases)


@dataclass(frozen=True, slots=True)
class Want:
    """An idle worker whose lease doesn't cover the first task that waits for it."""

    holder: LeasedWorker
    task: WaitingTask

    def need(self, gpu: GpuId) -> Need:
        return replace(self.holder.demands[gpu].need, workspace=self.task.workspace * self.holder.jobs)


def decide(snapshot: Snapshot) -> list[Assign | ChangeLease]:
    """Give each idle worker the first task that fits it, late stages first, none twice; and swap where that helps."""
    assigned: list[Assign] = []
    wants: list[Want] = []
    working: set[str] = set()  # holders with a task now or in their queue
    busiest: set[str] = set()  # with several
    for stage in reversed(STAGES):
        room = slots_ahead(stage, snapshot.depth)
        places = {(w.stage, w.model) for w in snapshot.idle} | {(h.stage, h.model) for h in snapshot.holders.values()}
        for place in sorted(places, key=str):
            if place[0] != stage:
                continue
            tasks = list(snapshot.waiting.get(place, ()))[:room]
            idle = [worker for worker in snapshot.idle if (worker.stage, worker.model) == place]
            given, left = pair(idle, tasks, snapshot.holders)
            assigned += given
            room -= len(given)
            holding = {worker.id: worker.holder for worker in idle}
            busy = {holding[action.worker] for action in given}
            working |= busy
            if snapshot.depth.get(stage, 0) > len(given):
                busiest |= busy
            if left:
                working |= {h.id for h in snapshot.holders.values() if (h.stage, h.model) == place}
                without = dict.fromkeys(holding[w.id] for w in idle if holding[w.id] not in busy)
                wants += match([snapshot.holders[h] for h in without if h in snapshot.holders], left, snapshot.gpus)
    held_by = {worker.id: worker.holder for worker in snapshot.idle}
    hands = Counter(held_by.values())
    resting = {id for id, count in hands.items() if id not in snapshot.holders or count == snapshot.holders[id].jobs}
    lent: list[ChangeLease] = []
    yielding: set[str] = set()
    for gpus, holders in gpu_groups(snapshot):
        spaces, ids = {gpu: snapshot.gpus[gpu] for gpu in gpus}, {holder.id for holder in holders}
        here = [want for want in wants if want.holder.id in ids]
        swaps = Swaps(spaces, holders, here, resting, working, busiest, snapshot.patience)
        swaps.plan()
        lent += swaps.lent
        yielding |= swaps.yielding
    return [*(action for action in assigned if held_by[action.worker] not in yielding), *lent]


def gpu_groups(snapshot: Snapshot) -> Iterator[tuple[set[GpuId], list[LeasedWorker]]]:
    """GPUs that must be looked at as one, since somebody lies on several of them; and who is there."""
    groups = {gpu: {gpu} for gpu in snapshot.gpus}
    for holder in snapshot.holders.values():
        if len(holder.demands) == 1:
            continue
        first, *others = (groups[gpu] for gpu in holder.demands)
        for other in others:
            if other is not first:
                first |= other
                groups |= dict.fromkeys(other, first)
    there: dict[int, list[LeasedWorker]] = {id(group): [] for group in groups.values()}
    for holder in snapshot.holders.values():
        there[id(groups[next(iter(holder.demands))])].append(holder)
    for gpu, group in groups.items():
        if gpu == next(iter(group)):
            yield group, there[id(group)]


def pair(
    idle: Sequence[IdleWorker], tasks: Sequence[WaitingTask], holders: Mapping[str, LeasedWorker]
) -> tuple[list[Assign], list[WaitingTask]]:
    """Tasks in their order to workers in theirs, and the tasks left over. A lease must cover its worker's task.

    Only a worker that can never have the room that a task takes may take a later one before it.
    """
    left = list(tasks)
    given: list[Assign] = []
    for worker in idle:
        holder = holders.get(worker.holder)
        task = next((task for task in left if holder is None or holder.can_ever(task)), None)
        if task and (holder is None or holder.covers(task)):
            left.remove(task)
            given.append(Assign(task.job, task.stage, worker.id))
    return given, left


def match(holders: Sequence[LeasedWorker], tasks: Sequence[WaitingTask], gpus: Mapping[GpuId, GpuSpace]) -> list[Want]:
    """Workers that must come in for tasks, each where that displaces least."""
    wants: list[Want] = []
    free = list(holders)
    for task in tasks:
        able = [holder for holder in free if holder.can_ever(task)]
        if not able:
            continue
        best = min(able, key=lambda holder: displaced(holder, task, gpus))
        free.remove(best)
        wants.append(Want(best, task))
    return wants


def displaced(holder: LeasedWorker, task: WaitingTask, gpus: Mapping[GpuId, GpuSpace]) -> int:
    """Bytes that others would have to give for all that a worker could use, in whole tenths of its weights."""
    missing = 0
    for gpu, demand in holder.demands.items():
        space = gpus[gpu].free + demand.lease if gpu in gpus else 0
        missing += max(0, demand.need.weights + task.workspace * holder.jobs - space)
    return missing * 10 // max(1, holder.weights)


def slots_ahead(stage: Stage, depth: Mapping[Stage, int]) -> int:
    """How many more tasks of a stage may start before too many results wait at the next."""
    if stage == "vae":
        return 1 << 30
    following = STAGES[STAGES.index(stage) + 1]
    return max(0, AHEAD[stage] - depth.get(following, 0))


class Swaps:
    """The swaps on GPUs that belong together: what is `lent`, and who is `yielding`, so that he gets no more tasks."""

    def __init__(
        self,
        spaces: Mapping[GpuId, GpuSpace],
        holders: Sequence[LeasedWorker],
        wants: Sequence[Want],
        idle: Collection[str],
        working: Collection[str],
        busiest: Collection[str],
        patience: float,
    ) -> None:
        self.holders, self.idle, self.patience = holders, idle, patience
        self.working, self.busiest = working, busiest
        self.free = {gpu: room.free for gpu, room in spaces.items()}
        self.available = {gpu: room.available for gpu, room in spaces.items()}
        self.wants = sorted(wants, key=self._urgency)
        self.needs: dict[GpuId, dict[str, Need]] = {gpu: {} for gpu in spaces}
        for holder in holders:
            for gpu, demand in holder.demands.items():
                self.needs[gpu][holder.id] = demand.need
        for want in wants:
            for gpu in want.holder.demands:
                self.needs[gpu][want.holder.id] = want.need(gpu)
        self.lease_sizes = {gpu: lease_sizes(room.available, self.needs[gpu]) for gpu, room in spaces.items()}
        self.lent: list[ChangeLease] = []
        self.yielding: set[str] = set()

    def plan(self) -> None:
        for want in self.wants:
            if not self._grant(want):
                self._make_room(want)
        wanting = {want.holder.id for want in self.wants}
        for holder in self._idle_holders():
            if holder.expired and holder.id not in wanting and holder.id not in self.working:
                self._take_back(holder)
        if not self.wants:
            self._widen()
            self._settle_down()
        for gpu in [gpu for gpu, free in self.free.items() if free < 0]:  # contexts have grown
            there = [holder for holder in self._idle_holders() if gpu in holder.demands]
            if there and not any(self._lies_on(lend.worker, gpu) for lend in self.lent):
                self._take_back(max(there, key=lambda holder: holder.demands[gpu].lease))

    def _widen(self) -> None:
        """More room for those that have streamed more than they would have to, before their next task."""
        for holder in self._idle_holders():
            sizes = {gpu: self._size(holder, gpu).exclusive for gpu in holder.demands}
            weights = {gpu: min(s.need.weights, sizes[gpu] - s.need.workspace) for gpu, s in holder.demands.items()}
            more = sum(weights[gpu] - demand.weight_bytes for gpu, demand in holder.demands.items())
            worth = more >= WORTH_A_SWAP * holder.weights
            untried = holder.refused is None or sum(sizes.values()) < holder.refused
            if holder.id in self.busiest and worth and untried and self._fits(holder, sizes):
                self._lend(holder, sizes, weights)
                self.yielding.add(holder.id)

    def _settle_down(self) -> None:
        """Those that will never have to go come in at once."""
        moved = {lend.worker for lend in self.lent}
        for holder in self.holders:
            waits = holder.lasting and holder.id in self.idle and not holder.lease and holder.id not in moved
            if waits and all(self._for_good(holder, gpu) for gpu in holder.demands):
                sizes = {gpu: self._size(holder, gpu).shared for gpu in holder.demands}
                if self._fits(holder, sizes):
                    self._lend(holder, sizes, {gpu: demand.need.weights for gpu, demand in holder.demands.items()})

    def _for_good(self, holder: LeasedWorker, gpu: GpuId) -> bool:
        size = self._size(holder, gpu).shared
        turns = [lease_size.exclusive for other, lease_size in self.lease_sizes[gpu].items() if other != holder.id]
        return size == self.needs[gpu][holder.id].whole and size + max(turns, default=0) <= self.available[gpu]

    def _urgency(self, want: Want) -> tuple[bool, float, int]:
        """Those that waited too long first, by how long; else late stages first."""
        late = self._overdue(want)
        return not late, -want.task.waited if late else 0.0, -STAGES.index(want.task.stage)

    def _overdue(self, want: Want) -> bool:
        return want.task.waited > self.patience

    def _grant(self, want: Want) -> bool:
        """Lend as much as there is for it; at most its turn, at least what it may have beside others."""
        holder, sizes = want.holder, {}
        for gpu, demand in holder.demands.items():
            lease_size = self._size(holder, gpu)
            for size in (lease_size.exclusive, lease_size.shared):
                if size and size - demand.lease <= self.free[gpu]:
                    sizes[gpu] = size
                    break
            else:
                return False
        if holder.id not in self.idle:
            self.yielding.add(holder.id)  # until its other hands are free
            return False
        space = want.task.workspace * holder.jobs
        weights = {gpu: min(demand.need.weights, sizes[gpu] - space) for gpu, demand in holder.demands.items()}
        self._lend(holder, sizes, weights)
        return True

    def _make_room(self, want: Want) -> None:
        """Take back what others don't need now; for an overdue task what they need, too, once their hands are free."""
        missing: dict[GpuId, int] = {}
        for gpu, demand in want.holder.demands.items():
            lease_size = self._size(want.holder, gpu)
            if not lease_size.exclusive:
                return
            missing[gpu] = (lease_size.shared or lease_size.exclusive) - demand.lease - self.free[gpu]
        givers = {gpu: self._givers(want, gpu, size) for gpu, size in missing.items() if size > 0}
        if not all(givers.values()):
            return
        gone: set[str] = set()
        for gpu, there in givers.items():
            for holder in sorted(there, key=lambda h: (h.id in self.working, -h.demands[gpu].lease, h.id)):
                if missing[gpu] <= 0:
                    break
                if holder.id in gone:
                    continue
                gone.add(holder.id)
                for other, demand in holder.demands.items():
                    missing[other] = missing.get(other, 0) - demand.lease
                if holder.id in self.idle:
                    self._take_back(holder)
                else:
                    self.yielding.add(holder.id)

    def _givers(self, want: Want, gpu: GpuId, missing: int) -> list[LeasedWorker]:
        """Whose leases of a GPU are enough together; none where none are."""
        lease_size = self._size(want.holder, gpu)
        others = [h for h in self._in_lease() if h.id != want.holder.id and gpu in h.demands]
        resting = [h for h in others if h.id not in self.working]
        above = [h for h in others if h.demands[gpu].lease > self._size(h, gpu).shared]
        both = [h for h in above if h in resting]
        tired = [h for h in others if h in resting or (self._overdue(want) and h.held > self.patience)]
        above_tired = [h for h in above if h in tired]
        choices = [both, resting, above_tired, tired]
        shared = sum(
            lease_size.shared for other, lease_size in self.lease_sizes[gpu].items() if other != want.holder.id
        )
        enough = sum(holder.demands[gpu].lease for holder in above) >= missing
        if (lease_size.shared or lease_size.exclusive) + shared <= self.available[gpu] and enough:
            choices = [both, above_tired]  # there is room beside those that stay, once the others are done
        for givers in choices:
            if sum(holder.demands[gpu].lease for holder in givers) >= missing:
                return givers
        return []

    def _size(self, holder: LeasedWorker, gpu: GpuId) -> LeaseSize:
        return self.lease_sizes[gpu][holder.id]

    def _lies_on(self, worker: str, gpu: GpuId) -> bool:
        return any(holder.id == worker and gpu in holder.demands for holder in self.holders)

    def _in_lease(self) -> list[LeasedWorker]:
        moved = {lend.worker for lend in self.lent}
        return [holder for holder in self.holders if holder.id not in moved and holder.lease]

    def _idle_holders(self) -> list[LeasedWorker]:
        return [holder for holder in self._in_lease() if holder.id in self.idle]

    def _fits(self, holder: LeasedWorker, sizes: Mapping[GpuId, int]) -> bool:
        return all(size and size - holder.demands[gpu].lease <= self.free[gpu] for gpu, size in sizes.items())

    def _lend(self, holder: LeasedWorker, sizes: Mapping[GpuId, int], weights: Mapping[GpuId, int]) -> None:
        for gpu, size in sizes.items():
            self.free[gpu] -= max(0, size - holder.demands[gpu].lease)
        leases = tuple(Lease(bytes=sizes[gpu], weight_bytes=weights[gpu]) for gpu in holder.demands)
        self.lent.append(ChangeLease(holder.id, leases))

    def _take_back(self, holder: LeasedWorker) -> None:
        """The memory is free only once the worker has given it back."""
        self.lent.append(ChangeLease(holder.id, (NOTHING,) * len(holder.demands)))
        self.yielding.add(holder.id)
