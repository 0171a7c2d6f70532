"""Who does what next: a pure function of a snapshot. No sockets, clocks or disks; the same code serves simulations.

The snapshot need not hold every waiting task, only the first of each queue: as many as there are idle workers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.live import ModelKey
from protocol.jobs import STAGES, Stage

# How far a stage may run ahead of the next, in jobs waiting there: finished embeddings (4 MB each for FLUX.1) must
# not pile up on disk while the denoiser works through them.
AHEAD: dict[Stage, int] = {"text": 64, "denoise": 256}


@dataclass(frozen=True, slots=True)
class WaitingTask:
    job: str
    stage: Stage
    model: ModelKey


@dataclass(frozen=True, slots=True)
class IdleWorker:
    id: str
    stage: Stage
    model: ModelKey


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`waiting` and `idle` in the order in which they should be served; `depth` counts all that wait at a stage."""

    waiting: Mapping[tuple[Stage, ModelKey], Sequence[WaitingTask]]
    idle: Sequence[IdleWorker]
    depth: Mapping[Stage, int]


@dataclass(frozen=True, slots=True)
class Assign:
    job: str
    stage: Stage
    worker: str


def decide(snapshot: Snapshot) -> list[Assign]:
    """Give each idle worker the first task that fits it, late stages first, none twice."""
    actions: list[Assign] = []
    for stage in reversed(STAGES):
        room = room_ahead(stage, snapshot.depth)
        idle: dict[ModelKey, list[IdleWorker]] = {}
        for worker in snapshot.idle:
            if worker.stage == stage:
                idle.setdefault(worker.model, []).append(worker)
        for model, workers in idle.items():
            tasks = snapshot.waiting.get((stage, model), ())
            pairs = list(zip(workers, tasks, strict=False))[:room]
            actions += [Assign(task.job, stage, worker.id) for worker, task in pairs]
            room -= len(pairs)
    return actions


def room_ahead(stage: Stage, depth: Mapping[Stage, int]) -> int:
    """How many more tasks of a stage may start before too many results wait at the next."""
    if stage == "vae":
        return 1 << 30
    following = STAGES[STAGES.index(stage) + 1]
    return max(0, AHEAD[stage] - depth.get(following, 0))
