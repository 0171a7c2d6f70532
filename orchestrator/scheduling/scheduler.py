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
from orchestrator.memory.lease_sizes import Level, Need, levels
from protocol.gpu_memory import Grant
from protocol.stages import STAGES, Stage

# How far a stage may run ahead of the next, in jobs waiting there: finished embeddings (4 MB each for FLUX.1) must
# not pile up on disk while the denoiser works through them.
AHEAD: dict[Stage, int] = {"text": 64, "denoise": 256}
WORTH_A_SWAP = 0.1  # of a worker's weights in place, more than before
NOTHING = Grant(bytes=0, weights=0)


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
class Seat:
    """What a worker takes and has of a GPU."""

    need: Need  # its workspace being that of the largest task that it has done, for all its jobs at once
    lease: int = 0  # bytes; while one is being changed, the larger of both
    share: int = 0  # of it for weights


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker that works in leases, idle or not."""

    id: str
    stage: Stage
    model: ModelKey
    seats: Mapping[int, Seat]  # by GPU
    jobs: int = 1  # at once: it is so many workers
    held: float = 0.0  # seconds since it has that lease
    expired: bool = False  # it has been idle for longer than its weights are to be kept
    lasting: bool = False  # its weights may come before there is work, and stay
    most: int | None = None  # bytes of workspace that it can ever have; None: whatever a task takes
    refused: int | None = None  # bytes of the smallest lease that it could not take

    @property
    def lease(self) -> int:
        return sum(seat.lease for seat in self.seats.values())

    @property
    def weights(self) -> int:
        return sum(seat.need.weights for seat in self.seats.values())

    def covers(self, task: WaitingTask) -> bool:
        space = task.workspace * self.jobs
        return all(seat.lease > 0 and space <= seat.lease - seat.share for seat in self.seats.values())

    def can_ever(self, task: WaitingTask) -> bool:
        return self.most is None or task.workspace <= self.most


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of a GPU's budget beside all contexts, and those of them in no lease."""

    available: int
    free: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`waiting` and `idle` in the order in which they should be served; `depth` counts all that wait at a stage."""

    waiting: Mapping[tuple[Stage, ModelKey], Sequence[WaitingTask]]
    idle: Sequence[IdleWorker]
    depth: Mapping[Stage, int]
    holders: Mapping[str, Holder] = field(default_factory=dict)  # by id
    gpus: Mapping[int, Room] = field(default_factory=dict)
    patience: float = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class Assign:
    job: str
    stage: Stage
    worker: str


@dataclass(frozen=True, slots=True)
class Lend:
    """What a worker may use from now on of each of its GPUs."""

    worker: str
    grants: tuple[Grant, ...]

    @property
    def bytes(self) -> int:
        """0 where it is to give back everything."""
        return sum(grant.bytes for grant in self.grants)

    @property
    def weights(self) -> int:
        return sum(grant.weights for grant in self.grants)


@dataclass(frozen=True, slots=True)
class Want:
    """An idle worker whose lease doesn't cover the first task that waits for it."""

    holder: Holder
    task: WaitingTask

    def need(self, gpu: int) -> Need:
        return replace(self.holder.seats[gpu].need, workspace=self.task.workspace * self.holder.jobs)


def decide(snapshot: Snapshot) -> list[Assign | Lend]:
    """Give each idle worker the first task that fits it, late stages first, none twice; and swap where that helps."""
    assigned: list[Assign] = []
    wants: list[Want] = []
    working: set[str] = set()  # holders with a task now or in their queue
    busiest: set[str] = set()  # with several
    for stage in reversed(STAGES):
        room = room_ahead(stage, snapshot.depth)
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
    lent: list[Lend] = []
    yielding: set[str] = set()
    for gpus, holders in together(snapshot):
        rooms, ids = {gpu: snapshot.gpus[gpu] for gpu in gpus}, {holder.id for holder in holders}
        here = [want for want in wants if want.holder.id in ids]
        turns = Turns(rooms, holders, here, resting, working, busiest, snapshot.patience)
        turns.play()
        lent += turns.lent
        yielding |= turns.yielding
    return [*(action for action in assigned if held_by[action.worker] not in yielding), *lent]


def together(snapshot: Snapshot) -> Iterator[tuple[set[int], list[Holder]]]:
    """GPUs that must be looked at as one, since somebody lies on several of them; and who is there."""
    groups = {gpu: {gpu} for gpu in snapshot.gpus}
    for holder in snapshot.holders.values():
        if len(holder.seats) == 1:
            continue
        first, *others = (groups[gpu] for gpu in holder.seats)
        for other in others:
            if other is not first:
                first |= other
                groups |= dict.fromkeys(other, first)
    there: dict[int, list[Holder]] = {id(group): [] for group in groups.values()}
    for holder in snapshot.holders.values():
        there[id(groups[next(iter(holder.seats))])].append(holder)
    for gpu, group in groups.items():
        if gpu == next(iter(group)):
            yield group, there[id(group)]


def pair(
    idle: Sequence[IdleWorker], tasks: Sequence[WaitingTask], holders: Mapping[str, Holder]
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


def match(holders: Sequence[Holder], tasks: Sequence[WaitingTask], gpus: Mapping[int, Room]) -> list[Want]:
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


def displaced(holder: Holder, task: WaitingTask, gpus: Mapping[int, Room]) -> int:
    """Bytes that others would have to give for all that a worker could use, in whole tenths of its weights."""
    missing = 0
    for gpu, seat in holder.seats.items():
        space = gpus[gpu].free + seat.lease if gpu in gpus else 0
        missing += max(0, seat.need.weights + task.workspace * holder.jobs - space)
    return missing * 10 // max(1, holder.weights)


def room_ahead(stage: Stage, depth: Mapping[Stage, int]) -> int:
    """How many more tasks of a stage may start before too many results wait at the next."""
    if stage == "vae":
        return 1 << 30
    following = STAGES[STAGES.index(stage) + 1]
    return max(0, AHEAD[stage] - depth.get(following, 0))


class Turns:
    """The swaps on GPUs that belong together: what is `lent`, and who is `yielding`, so that he gets no more tasks."""

    def __init__(
        self,
        rooms: Mapping[int, Room],
        holders: Sequence[Holder],
        wants: Sequence[Want],
        idle: Collection[str],
        working: Collection[str],
        busiest: Collection[str],
        patience: float,
    ) -> None:
        self.holders, self.idle, self.patience = holders, idle, patience
        self.working, self.busiest = working, busiest
        self.free = {gpu: room.free for gpu, room in rooms.items()}
        self.available = {gpu: room.available for gpu, room in rooms.items()}
        self.wants = sorted(wants, key=self._urgency)
        self.needs: dict[int, dict[str, Need]] = {gpu: {} for gpu in rooms}
        for holder in holders:
            for gpu, seat in holder.seats.items():
                self.needs[gpu][holder.id] = seat.need
        for want in wants:
            for gpu in want.holder.seats:
                self.needs[gpu][want.holder.id] = want.need(gpu)
        self.levels = {gpu: levels(room.available, self.needs[gpu]) for gpu, room in rooms.items()}
        self.lent: list[Lend] = []
        self.yielding: set[str] = set()

    def play(self) -> None:
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
            there = [holder for holder in self._idle_holders() if gpu in holder.seats]
            if there and not any(self._lies_on(lend.worker, gpu) for lend in self.lent):
                self._take_back(max(there, key=lambda holder: holder.seats[gpu].lease))

    def _widen(self) -> None:
        """More room for those that have streamed more than they would have to, before their next task."""
        for holder in self._idle_holders():
            sizes = {gpu: self._level(holder, gpu).turn for gpu in holder.seats}
            shares = {gpu: min(s.need.weights, sizes[gpu] - s.need.workspace) for gpu, s in holder.seats.items()}
            more = sum(shares[gpu] - seat.share for gpu, seat in holder.seats.items())
            worth = more >= WORTH_A_SWAP * holder.weights
            untried = holder.refused is None or sum(sizes.values()) < holder.refused
            if holder.id in self.busiest and worth and untried and self._fits(holder, sizes):
                self._lend(holder, sizes, shares)
                self.yielding.add(holder.id)

    def _settle_down(self) -> None:
        """Those that will never have to go come in at once."""
        moved = {lend.worker for lend in self.lent}
        for holder in self.holders:
            waits = holder.lasting and holder.id in self.idle and not holder.lease and holder.id not in moved
            if waits and all(self._for_good(holder, gpu) for gpu in holder.seats):
                sizes = {gpu: self._level(holder, gpu).beside for gpu in holder.seats}
                if self._fits(holder, sizes):
                    self._lend(holder, sizes, {gpu: seat.need.weights for gpu, seat in holder.seats.items()})

    def _for_good(self, holder: Holder, gpu: int) -> bool:
        size = self._level(holder, gpu).beside
        turns = [level.turn for other, level in self.levels[gpu].items() if other != holder.id]
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
        for gpu, seat in holder.seats.items():
            level = self._level(holder, gpu)
            for size in (level.turn, level.beside):
                if size and size - seat.lease <= self.free[gpu]:
                    sizes[gpu] = size
                    break
            else:
                return False
        if holder.id not in self.idle:
            self.yielding.add(holder.id)  # until its other hands are free
            return False
        space = want.task.workspace * holder.jobs
        shares = {gpu: min(seat.need.weights, sizes[gpu] - space) for gpu, seat in holder.seats.items()}
        self._lend(holder, sizes, shares)
        return True

    def _make_room(self, want: Want) -> None:
        """Take back what others don't need now; for an overdue task what they need, too, once their hands are free."""
        missing: dict[int, int] = {}
        for gpu, seat in want.holder.seats.items():
            level = self._level(want.holder, gpu)
            if not level.turn:
                return
            missing[gpu] = (level.beside or level.turn) - seat.lease - self.free[gpu]
        givers = {gpu: self._givers(want, gpu, size) for gpu, size in missing.items() if size > 0}
        if not all(givers.values()):
            return
        gone: set[str] = set()
        for gpu, there in givers.items():
            for holder in sorted(there, key=lambda h: (h.id in self.working, -h.seats[gpu].lease, h.id)):
                if missing[gpu] <= 0:
                    break
                if holder.id in gone:
                    continue
                gone.add(holder.id)
                for other, seat in holder.seats.items():
                    missing[other] = missing.get(other, 0) - seat.lease
                if holder.id in self.idle:
                    self._take_back(holder)
                else:
                    self.yielding.add(holder.id)

    def _givers(self, want: Want, gpu: int, missing: int) -> list[Holder]:
        """Whose leases of a GPU are enough together; none where none are."""
        level = self._level(want.holder, gpu)
        others = [h for h in self._in_lease() if h.id != want.holder.id and gpu in h.seats]
        resting = [h for h in others if h.id not in self.working]
        above = [h for h in others if h.seats[gpu].lease > self._level(h, gpu).beside]
        both = [h for h in above if h in resting]
        tired = [h for h in others if h in resting or (self._overdue(want) and h.held > self.patience)]
        above_tired = [h for h in above if h in tired]
        choices = [both, resting, above_tired, tired]
        beside = sum(level.beside for other, level in self.levels[gpu].items() if other != want.holder.id)
        enough = sum(holder.seats[gpu].lease for holder in above) >= missing
        if (level.beside or level.turn) + beside <= self.available[gpu] and enough:
            choices = [both, above_tired]  # there is room beside those that stay, once the others are done
        for givers in choices:
            if sum(holder.seats[gpu].lease for holder in givers) >= missing:
                return givers
        return []

    def _level(self, holder: Holder, gpu: int) -> Level:
        return self.levels[gpu][holder.id]

    def _lies_on(self, worker: str, gpu: int) -> bool:
        return any(holder.id == worker and gpu in holder.seats for holder in self.holders)

    def _in_lease(self) -> list[Holder]:
        moved = {lend.worker for lend in self.lent}
        return [holder for holder in self.holders if holder.id not in moved and holder.lease]

    def _idle_holders(self) -> list[Holder]:
        return [holder for holder in self._in_lease() if holder.id in self.idle]

    def _fits(self, holder: Holder, sizes: Mapping[int, int]) -> bool:
        return all(size and size - holder.seats[gpu].lease <= self.free[gpu] for gpu, size in sizes.items())

    def _lend(self, holder: Holder, sizes: Mapping[int, int], shares: Mapping[int, int]) -> None:
        for gpu, size in sizes.items():
            self.free[gpu] -= max(0, size - holder.seats[gpu].lease)
        grants = tuple(Grant(bytes=sizes[gpu], weights=shares[gpu]) for gpu in holder.seats)
        self.lent.append(Lend(holder.id, grants))

    def _take_back(self, holder: Holder) -> None:
        """The memory is free only once the worker has given it back."""
        self.lent.append(Lend(holder.id, (NOTHING,) * len(holder.seats)))
        self.yielding.add(holder.id)
