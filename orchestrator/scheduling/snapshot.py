"""All that a decision of the scheduler depends on, and what it may decide."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.job import ModelKey
from orchestrator.memory.lease_sizes import Loan, Need
from protocol.gpu_memory import GpuId, Lease
from protocol.stages import STAGES, TRAITS, Stage

NOTHING = Lease(bytes=0, weight_bytes=0)
UNLIMITED = 1 << 30  # tasks
Place = tuple[Stage, ModelKey]  # of models that share a stage: the one of them that stands for all
Line = tuple[Stage, ModelKey, int]  # of those that wait at a place: as many visits from their end
Depth = Mapping[Line, int]  # jobs that wait


@dataclass(frozen=True, slots=True)
class WaitingTask:
    job: str
    stage: Stage
    model: ModelKey
    distance: int  # visits to the end of its job, this one included
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
    """The memory of a GPU that a worker needs, and its lease."""

    need: Need  # its workspace being that of the largest task that it has done, for all its jobs at once
    lease: int = 0  # bytes, without those that are lent; while one is being changed, the larger of both
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
    lendable: int = 0  # bytes of its lease that it may lend
    loan: Loan | None = None  # until it is over it gets no task, and no other lease
    lent_for: float = 0.0  # seconds since it was given
    back_for: float = math.inf  # seconds since one came back that had lasted for longer than patience
    busy: bool = False  # it has a task
    idle_for: float = 0.0  # seconds since it last had one

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
    passing: int = 0  # in leases of processes that are gone, or nearly so


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`waiting` and `idle` in the order in which they should be served; `depth` counts all that wait."""

    waiting: Mapping[Place, Sequence[WaitingTask]]
    idle: Sequence[IdleWorker]
    depth: Depth
    holders: Mapping[str, LeasedWorker] = field(default_factory=dict)  # by id
    gpus: Mapping[GpuId, GpuSpace] = field(default_factory=dict)
    patience: float = 30.0  # seconds
    ahead: Mapping[Stage, int] = field(default_factory=lambda: {stage: TRAITS[stage].ahead for stage in STAGES})
    common: Mapping[Place, Place] = field(default_factory=dict)  # of stages that models have in common

    def place(self, one: "WaitingTask | IdleWorker | LeasedWorker") -> Place:
        """Return where a task waits, and which tasks a worker does."""
        own = one.stage, one.model
        return self.common.get(own, own)

    def at(self, place: Place) -> list["LeasedWorker"]:
        """Return the workers in leases of a place."""
        return [holder for holder in self.holders.values() if self.place(holder) == place]


@dataclass(frozen=True, slots=True)
class Assign:
    job: str
    stage: Stage
    worker: str


@dataclass(frozen=True, slots=True)
class ChangeLease:
    """A new lease for a worker, of each of its GPUs."""

    worker: str
    leases: tuple[Lease, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the leases together; 0 where it is to give back everything."""
        return sum(lease.bytes for lease in self.leases)

    @property
    def weight_bytes(self) -> int:
        return sum(lease.weight_bytes for lease in self.leases)


@dataclass(frozen=True, slots=True)
class TakeLoan:
    """Borrow from a worker, which computes nothing from its next step on until it has the bytes back."""

    worker: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ReturnLoan:
    """Let a worker have back what it has lent, but for what is missing of it: its lease is so much smaller then."""

    worker: str
    missing: int = 0  # bytes


Action = Assign | ChangeLease | TakeLoan | ReturnLoan


@dataclass(frozen=True, slots=True)
class Want:
    """An idle worker whose lease doesn't cover the first task that waits for it."""

    holder: LeasedWorker
    task: WaitingTask

    def need(self, gpu: GpuId) -> Need:
        return replace(self.holder.demands[gpu].need, workspace=self.task.workspace * self.holder.jobs)


def stand_in(
    holder: LeasedWorker, there: Sequence[LeasedWorker], able: Callable[[LeasedWorker], bool] = lambda _: True
) -> LeasedWorker | None:
    """Return another model's worker of the same place, on one of a worker's GPUs, that does what it would do.

    So what models share comes in once. It is the one that is in, or else the first of those that are `able`; None for a
    worker that is in itself, or is that one.
    """
    if holder.lease:
        return None
    mine = [one for one in there if one.demands.keys() & holder.demands.keys() and (one is holder or able(one))]
    first = next((one for one in mine if one.lease), mine[0])
    return first if first.model != holder.model else None


def far_ahead(workers: int) -> dict[Stage, int]:
    """Return how many jobs may wait beyond each stage in a stack of so many workers.

    That is its trait in a small stack, and two jobs for each worker in a large one, whose denoisers would else have
    nothing to do until text encoders come in again.
    """
    return {stage: max(TRAITS[stage].ahead, 2 * workers) for stage in STAGES}


def slots_ahead(task: WaitingTask, depth: Depth, ahead: Mapping[Stage, int]) -> int:
    """Return how many tasks like this one may start, before too many of its model's jobs wait nearer to their end.

    The tasks nearest to the end are never held up, so some job can always go on.
    """
    lines = depth.items()
    nearer = sum(count for (_, model, distance), count in lines if model == task.model and distance < task.distance)
    return ahead[task.stage] - nearer if nearer else UNLIMITED


def line_of(task: WaitingTask) -> Line:
    return task.stage, task.model, task.distance


def waiting_at(place: Place, snapshot: Snapshot) -> int:
    """Return how many jobs wait at a stage of a model, or of all models that share it."""
    own, lines = snapshot.common, snapshot.depth.items()
    return sum(count for (stage, model, _), count in lines if own.get((stage, model), (stage, model)) == place)
