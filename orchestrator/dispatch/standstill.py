"""Detection of tasks that wait and come no nearer to their end: pure but for a clock that numbers the looks.

A place (a stage of a model) stands still if its tasks wait, no worker is busy on the GPUs of its workers, and the same
state is met again and again: how much each holds, what is kept and free, which task comes first. With leases that go to
and fro each meeting counts. Where nothing is done at all, one meeting a tick counts, since memory may come free outside
of the stack, and a task's patience may end.
"""

import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.scheduling.scheduler import decide, startable
from orchestrator.scheduling.snapshot import Action, Assign, GpuSpace, LeasedWorker, Place, Snapshot

TICK_SECONDS = 0.5
MEETINGS = 20  # of one state while leases change
QUIET_TICKS = 140  # of one state while nothing is done, at least
GRACE_TICKS = 20  # beyond a task's patience
HOPELESS_TICKS = 6  # the same where nothing could be done with all the patience and all the memory that there may be


@dataclass(frozen=True, slots=True)
class Busy:
    """Occupied workers, by the ids of those that have leases."""

    working: Collection[str]
    changing: Collection[str]  # leases
    places: Collection[Place]  # where somebody works


@dataclass(slots=True)
class Meetings:
    count: int = 0
    tick: int = -1


@dataclass(slots=True)
class Standstill:
    clock: Callable[[], float] = time.monotonic  # seconds
    _met: dict[Hashable, Meetings] = field(default_factory=dict)

    def moved(self) -> None:
        """Forget all meetings: a task came nearer to its end, or a worker came or went."""
        self._met.clear()

    def look(self, snapshot: Snapshot, actions: Sequence[Action], busy: Busy) -> list[Place]:
        """The places that stand still, having met the same state too often."""
        tick = int(self.clock() / TICK_SECONDS)
        found: list[Place] = []
        for place, there in waiting_in_vain(snapshot, actions, busy):
            ids = {holder.id for holder in there}
            acts = any(action.worker in ids for action in actions)
            if not acts and ids & {*busy.changing}:
                continue
            meetings = self._met.setdefault((place, acts, state_of(snapshot, place, there)), Meetings())
            if acts or meetings.tick != tick:
                meetings.count, meetings.tick = meetings.count + 1, tick
            if meetings.count >= (MEETINGS if acts else quiet_ticks(snapshot, ids)):
                found.append(place)
        return found


def waiting_in_vain(
    snapshot: Snapshot, actions: Sequence[Action], busy: Busy
) -> Iterator[tuple[Place, list[LeasedWorker]]]:
    """Yield places whose tasks wait while no worker is busy on their GPUs, each with all workers in leases there."""
    assigned = {action.job for action in actions if isinstance(action, Assign)}
    for place, tasks in snapshot.waiting.items():
        mine = snapshot.at(place)
        taken = assigned & {task.job for task in tasks}
        if not tasks or not mine or taken or place in busy.places or not startable(tasks, snapshot, {}):
            continue
        gpus = {gpu for holder in mine for gpu in holder.demands}
        while more := {g for h in snapshot.holders.values() if gpus & {*h.demands} for g in h.demands} - gpus:
            gpus |= more
        there = [holder for holder in snapshot.holders.values() if gpus & {*holder.demands}]
        if not {holder.id for holder in there} & {*busy.working}:
            yield place, there


def state_of(snapshot: Snapshot, place: Place, there: Sequence[LeasedWorker]) -> Hashable:
    """Return all that decides what can be done for a place, but for the time that passes."""
    demands = tuple((h.id, tuple((gpu, d.lease, d.weight_bytes) for gpu, d in h.demands.items())) for h in there)
    gpus = {gpu for holder in there for gpu in holder.demands}
    spaces = tuple((gpu, snapshot.gpus[gpu]) for gpu in sorted(gpus) if gpu in snapshot.gpus)
    first = snapshot.waiting[place][0]
    return first.job, first.workspace, demands, spaces


def quiet_ticks(snapshot: Snapshot, ids: Collection[str]) -> int:
    """Return how many ticks to wait where nothing is done."""
    waiting = {
        place: [replace(task, waited=float("inf")) for task in tasks] for place, tasks in snapshot.waiting.items()
    }
    holders = {id: replace(holder, held=float("inf")) for id, holder in snapshot.holders.items()}
    leased = dict.fromkeys(snapshot.gpus, 0)
    for holder in holders.values():
        for gpu, demand in holder.demands.items():
            leased[gpu] += demand.lease
    spaces = {gpu: GpuSpace(room.available, room.available - leased[gpu]) for gpu, room in snapshot.gpus.items()}
    best = replace(snapshot, waiting=waiting, holders=holders, gpus=spaces)
    quiet = max(QUIET_TICKS, int(snapshot.patience / TICK_SECONDS) + GRACE_TICKS)
    return quiet if any(action.worker in ids for action in decide(best)) else HOPELESS_TICKS
