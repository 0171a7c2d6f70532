"""Who does what next: a pure function of a snapshot. No sockets, clocks or disks; the same code serves simulations.

The snapshot need not hold every waiting task, only the first of each queue: as many as there are idle workers.

A stage may have many workers, on GPUs of any size. A task goes to whoever is free and has room for it; where nobody is
in, one comes in where that displaces least.

Where workers of a GPU must take turns, the one that is in goes on until its queue is empty, unless another's task and
its own turn have lasted for longer than `patience`. Nobody is sent away where there is room. Who streams more than
needed gets more room, where several tasks wait for him and nobody else wants it. What fits beside all others for good
comes in before there is work.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.leases import Need, levels
from orchestrator.live import ModelKey
from protocol.jobs import STAGES, Stage

# How far a stage may run ahead of the next, in jobs waiting there: finished embeddings (4 MB each for FLUX.1) must
# not pile up on disk while the denoiser works through them.
AHEAD: dict[Stage, int] = {"text": 64, "denoise": 256}
WORTH_A_SWAP = 0.1  # of a worker's weights in place, more than before


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


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker that works in leases of one GPU, idle or not."""

    id: str
    stage: Stage
    model: ModelKey
    gpu: int
    need: Need  # its workspace being that of the largest task that it has done
    lease: int = 0  # bytes; while one is being changed, the larger of both
    share: int = 0  # of it for weights
    held: float = 0.0  # seconds since it has that lease
    expired: bool = False  # it has been idle for longer than its weights are to be kept
    lasting: bool = False  # its weights may come before there is work, and stay
    most: int | None = None  # bytes of workspace that it can ever have; None: whatever a task takes

    def covers(self, task: WaitingTask) -> bool:
        return self.lease > 0 and task.workspace <= self.lease - self.share

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
    """A worker may use so many bytes of its GPU from now on, `weights` of them for weights; 0: none."""

    worker: str
    bytes: int
    weights: int


@dataclass(frozen=True, slots=True)
class Want:
    """An idle worker whose lease doesn't cover the first task that waits for it."""

    holder: Holder
    task: WaitingTask

    @property
    def need(self) -> Need:
        return Need(self.holder.need.weights, self.holder.need.least, self.task.workspace)


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
            busy = {action.worker for action in given}
            working |= busy
            if snapshot.depth.get(stage, 0) > len(given):
                busiest |= busy
            if left:
                working |= {h.id for h in snapshot.holders.values() if (h.stage, h.model) == place}
                without = [snapshot.holders[w.id] for w in idle if w.id in snapshot.holders and w.id not in busy]
                wants += match(without, left, snapshot.gpus)
    idle_ids = {worker.id for worker in snapshot.idle}
    lent: list[Lend] = []
    yielding: set[str] = set()
    for gpu, space in snapshot.gpus.items():
        holders = [holder for holder in snapshot.holders.values() if holder.gpu == gpu]
        here = [want for want in wants if want.holder.gpu == gpu]
        turns = Turns(space, holders, here, idle_ids, working, busiest, snapshot.patience)
        turns.play()
        lent += turns.lent
        yielding |= turns.yielding
    return [*(action for action in assigned if action.worker not in yielding), *lent]


def pair(
    idle: Sequence[IdleWorker], tasks: Sequence[WaitingTask], holders: Mapping[str, Holder]
) -> tuple[list[Assign], list[WaitingTask]]:
    """Tasks in their order to workers in theirs, and the tasks left over. A lease must cover its worker's task.

    Only a worker that can never have the room that a task takes may take a later one before it.
    """
    left = list(tasks)
    given: list[Assign] = []
    for worker in idle:
        holder = holders.get(worker.id)
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
    space = gpus[holder.gpu].free + holder.lease if holder.gpu in gpus else 0
    return max(0, holder.need.weights + task.workspace - space) * 10 // max(1, holder.need.weights)


def room_ahead(stage: Stage, depth: Mapping[Stage, int]) -> int:
    """How many more tasks of a stage may start before too many results wait at the next."""
    if stage == "vae":
        return 1 << 30
    following = STAGES[STAGES.index(stage) + 1]
    return max(0, AHEAD[stage] - depth.get(following, 0))


class Turns:
    """The swaps on one GPU: what is `lent`, and who is `yielding`, so that he gets no more tasks for now."""

    def __init__(
        self,
        room: Room,
        holders: Sequence[Holder],
        wants: Sequence[Want],
        idle: Collection[str],
        working: Collection[str],
        busiest: Collection[str],
        patience: float,
    ) -> None:
        self.holders, self.idle, self.patience = holders, idle, patience
        self.working, self.busiest = working, busiest
        self.free = room.free
        self.wants = sorted(wants, key=self._urgency)
        needs = {holder.id: holder.need for holder in holders} | {want.holder.id: want.need for want in wants}
        self.needs, self.levels, self.available = needs, levels(room.available, needs), room.available
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
        if self.free < 0 and not self.lent and (there := self._idle_holders()):  # contexts have grown
            self._take_back(max(there, key=lambda holder: holder.lease))

    def _widen(self) -> None:
        """More room for those that have streamed more than they would have to, before their next task."""
        for holder in self._idle_holders():
            turn = self.levels[holder.id].turn
            share = min(holder.need.weights, turn - holder.need.workspace)
            worth = share >= holder.share + WORTH_A_SWAP * holder.need.weights
            if holder.id in self.busiest and worth and turn - holder.lease <= self.free:
                self.free -= max(0, turn - holder.lease)
                self.lent.append(Lend(holder.id, turn, share))
                self.yielding.add(holder.id)

    def _settle_down(self) -> None:
        """Those that will never have to go come in at once."""
        moved = {lend.worker for lend in self.lent}
        for holder in self.holders:
            size = self.levels[holder.id].beside
            waits = holder.lasting and holder.id in self.idle and not holder.lease and holder.id not in moved
            turns = [self.levels[other.id].turn for other in self.holders if other.id != holder.id]
            for_good = size == self.needs[holder.id].whole and size + max(turns, default=0) <= self.available
            if waits and for_good and size <= self.free:
                self.free -= size
                self.lent.append(Lend(holder.id, size, holder.need.weights))

    def _urgency(self, want: Want) -> tuple[bool, float, int]:
        """Those that waited too long first, by how long; else late stages first."""
        late = self._overdue(want)
        return not late, -want.task.waited if late else 0.0, -STAGES.index(want.task.stage)

    def _overdue(self, want: Want) -> bool:
        return want.task.waited > self.patience

    def _grant(self, want: Want) -> bool:
        """Lend as much as there is for it; at most its turn, at least what it may have beside others."""
        holder, level = want.holder, self.levels[want.holder.id]
        for size in (level.turn, level.beside):
            if size and size - holder.lease <= self.free:
                self.free -= max(0, size - holder.lease)
                self.lent.append(Lend(holder.id, size, min(holder.need.weights, size - want.task.workspace)))
                return True
        return False

    def _make_room(self, want: Want) -> None:
        """Take back what others don't need now; for an overdue task what they need, too, once their hands are free."""
        level = self.levels[want.holder.id]
        missing = (level.beside or level.turn) - want.holder.lease - self.free
        if not level.turn or missing <= 0:
            return
        others = [h for h in self._in_lease() if h.id != want.holder.id]
        resting = [h for h in others if h.id not in self.working]
        above = [h for h in others if h.lease > self.levels[h.id].beside]
        both = [h for h in above if h in resting]
        tired = [h for h in others if h in resting or (self._overdue(want) and h.held > self.patience)]
        above_tired = [h for h in above if h in tired]
        choices = [both, resting, above_tired, tired]
        beside = sum(self.levels[h.id].beside for h in self.holders if h.id != want.holder.id)
        if (level.beside or level.turn) + beside <= self.available and sum(h.lease for h in above) >= missing:
            choices = [both, above_tired]  # there is room beside those that stay, once the others are done
        for givers in choices:
            if sum(holder.lease for holder in givers) >= missing:
                break
        else:
            return
        for holder in sorted(givers, key=lambda h: (h.id in self.working, -h.lease, h.id)):
            if missing <= 0:
                return
            missing -= holder.lease
            if holder.id in self.idle:
                self._take_back(holder)
            else:
                self.yielding.add(holder.id)

    def _in_lease(self) -> list[Holder]:
        moved = {lend.worker for lend in self.lent}
        return [holder for holder in self.holders if holder.lease and holder.id not in moved]

    def _idle_holders(self) -> list[Holder]:
        return [holder for holder in self._in_lease() if holder.id in self.idle]

    def _take_back(self, holder: Holder) -> None:
        """The memory is free only once the worker has given it back."""
        self.lent.append(Lend(holder.id, 0, 0))
        self.yielding.add(holder.id)
