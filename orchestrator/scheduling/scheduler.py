"""The scheduler: which worker does which task next. A pure function of a snapshot, which serves simulations, too.

The snapshot need not hold every waiting task, only the first of each queue: as many as there are idle workers.

A stage may have many workers, on GPUs of any size. A task goes to a worker that is free and has room for it; where none
is in, one comes in where that displaces least. A worker on several GPUs comes in on all of them, or on none.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from orchestrator.scheduling.snapshot import (
    Action,
    Assign,
    GpuSpace,
    IdleWorker,
    LeasedWorker,
    Line,
    Place,
    Snapshot,
    WaitingTask,
    Want,
    line_of,
    slots_ahead,
    stand_in,
    waiting_at,
)
from orchestrator.scheduling.swaps import Swaps
from protocol.gpu_memory import GpuId
from protocol.stages import TRAITS


def decide(snapshot: Snapshot) -> list[Action]:
    """Give each idle worker the first task that fits it, nearest to its end first; and swap where that helps."""
    assigned: list[Assign] = []
    wants: list[Want] = []
    working: set[str] = set()  # holders with a task now or in their queue
    busiest: set[str] = set()  # with several
    started: Counter[Line] = Counter()
    idle_at: dict[Place, list[IdleWorker]] = {}
    for worker in snapshot.idle:
        idle_at.setdefault(snapshot.place(worker), []).append(worker)
    for place in places_of(snapshot):
        tasks = startable(snapshot.waiting.get(place, ()), snapshot, started)
        idle = idle_at.get(place, [])
        given, left = pair(idle, tasks, snapshot.holders)
        assigned += given
        jobs = {action.job for action in given}
        started.update(line_of(task) for task in tasks if task.job in jobs)
        holding = {worker.id: worker.holder for worker in idle}
        busy = {holding[action.worker] for action in given}
        working |= busy
        if waiting_at(place, snapshot) > len(given):
            busiest |= busy
        if left:
            there = snapshot.at(place)
            working |= {holder.id for holder in there}
            without = dict.fromkeys(holding[w.id] for w in idle if holding[w.id] not in busy)
            out = [snapshot.holders[holder] for holder in without if holder in snapshot.holders]
            if place in snapshot.common:
                out = without_stand_ins(out, there, left[0])
            wants += match(out, left, snapshot.gpus)
    held_by = {worker.id: worker.holder for worker in snapshot.idle}
    free = Counter(held_by.values())
    resting = {id for id, count in free.items() if id not in snapshot.holders or count == snapshot.holders[id].jobs}
    changes: list[Action] = []
    yielding: set[str] = set()
    for gpus, holders in gpu_groups(snapshot):
        spaces, ids = {gpu: snapshot.gpus[gpu] for gpu in gpus}, {holder.id for holder in holders}
        here = [want for want in wants if want.holder.id in ids]
        swaps = Swaps(spaces, holders, here, resting, working, busiest, snapshot)
        swaps.plan()
        changes += [*swaps.lent, *swaps.loans]
        yielding |= swaps.yielding
    return [*(action for action in assigned if held_by[action.worker] not in yielding), *changes]


def places_of(snapshot: Snapshot) -> list[Place]:
    """Stages of models that have workers: whose first task is nearest to its end, then whose has waited longest."""
    places = {*map(snapshot.place, snapshot.idle), *map(snapshot.place, snapshot.holders.values())}

    def turn(place: Place) -> tuple[int, float, str]:
        tasks = snapshot.waiting.get(place)
        distance, waited = (tasks[0].distance, tasks[0].waited) if tasks else (TRAITS[place[0]].distance, 0.0)
        return distance, -waited, str(place)

    return sorted(places, key=turn)


def startable(tasks: Sequence[WaitingTask], snapshot: Snapshot, started: Mapping[Line, int]) -> list[WaitingTask]:
    """The tasks of a place that may start, so many of each kind having been started already."""
    left: dict[Line, int] = {}
    found: list[WaitingTask] = []
    for task in tasks:
        line = line_of(task)
        if line not in left:
            left[line] = slots_ahead(task, snapshot.depth, snapshot.ahead) - started.get(line, 0)
        if left[line] > 0:
            left[line] -= 1
            found.append(task)
    return found


def gpu_groups(snapshot: Snapshot) -> Iterator[tuple[set[GpuId], list[LeasedWorker]]]:
    """Yield GPUs that must be looked at as one, since a worker lies on several of them; and the workers there."""
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
    """Pair tasks in their order with workers in theirs; return the tasks left over, too. A lease must cover its task.

    Only a worker that can never have the room that a task takes may take a later one before it.
    """
    left = list(tasks)
    given: list[Assign] = []
    for worker in idle:
        if not left:
            break
        holder = holders.get(worker.holder)
        task = next((task for task in left if holder is None or holder.can_ever(task)), None)
        if task and (holder is None or holder.covers(task)):
            left.remove(task)
            given.append(Assign(task.job, task.stage, worker.id))
    return given, left


def without_stand_ins(
    out: Sequence[LeasedWorker], there: Sequence[LeasedWorker], task: WaitingTask
) -> list[LeasedWorker]:
    """Return the workers that may come in for a task of several models: of these one on a GPU."""
    on: dict[GpuId, list[LeasedWorker]] = {}
    for holder in there:
        for gpu in holder.demands:
            on.setdefault(gpu, []).append(holder)

    def able(holder: LeasedWorker) -> bool:
        return holder.refused is None and holder.can_ever(task)

    return [one for one in out if not stand_in(one, [other for gpu in one.demands for other in on[gpu]], able)]


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
