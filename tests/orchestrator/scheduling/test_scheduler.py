"""The scheduler is a pure function: every idle worker gets the first task that fits, and none twice."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.job import ModelKey
from orchestrator.scheduling.scheduler import decide
from orchestrator.scheduling.snapshot import IdleWorker, Snapshot, WaitingTask, line_of, slots_ahead
from protocol.stages import STAGES, Stage

MODELS = (ModelKey("a", "float32"), ModelKey("a", "bfloat16"), ModelKey("b", "float32"))
PLACES = st.tuples(st.sampled_from(STAGES), st.sampled_from(MODELS))


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    idle = [IdleWorker(f"w{i}", *place) for i, place in enumerate(draw(st.lists(PLACES, max_size=12)))]
    waiting: dict[tuple[Stage, ModelKey], list[WaitingTask]] = {}
    for i, (stage, model) in enumerate(draw(st.lists(PLACES, max_size=20))):
        waiting.setdefault((stage, model), []).append(WaitingTask(f"j{i}", stage, model, draw(st.integers(1, 6))))
    lines = [(stage, model, distance) for stage in STAGES for model in MODELS for distance in range(1, 7)]
    depth = {line: draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1, 63, 64, 100])) for line in lines}
    common = {
        (stage, model): (stage, MODELS[0]) for stage in draw(st.sets(st.sampled_from(STAGES))) for model in MODELS
    }
    together: dict[tuple[Stage, ModelKey], list[WaitingTask]] = {}
    for place, tasks in waiting.items():
        together.setdefault(common.get(place, place), []).extend(tasks)
    for tasks in together.values():
        tasks.sort(key=lambda task: task.distance)
    return Snapshot(together, idle, depth, common=common)


@given(snapshots())
def test_no_task_and_no_worker_is_used_twice_and_all_fit(snapshot: Snapshot) -> None:
    actions = decide(snapshot)
    workers = {worker.id: worker for worker in snapshot.idle}
    tasks = {task.job: task for queue in snapshot.waiting.values() for task in queue}
    assert len({action.worker for action in actions}) == len(actions) == len({action.job for action in actions})
    for action in actions:
        assert snapshot.place(workers[action.worker]) == snapshot.place(tasks[action.job])
        assert workers[action.worker].stage == tasks[action.job].stage == action.stage


@given(snapshots())
def test_no_worker_idles_beside_work_unless_too_many_wait_nearer_to_the_end(snapshot: Snapshot) -> None:
    actions = decide(snapshot)
    busy, given_out = {a.worker for a in actions}, {a.job for a in actions}
    tasks = {task.job: task for queue in snapshot.waiting.values() for task in queue}
    started = Counter(line_of(tasks[a.job]) for a in actions)
    for worker in snapshot.idle:
        left = [t for t in snapshot.waiting.get(snapshot.place(worker), ()) if t.job not in given_out]
        if worker.id not in busy:
            for task in left:
                assert started[line_of(task)] >= slots_ahead(task, snapshot.depth, snapshot.ahead)


@given(snapshots())
def test_order_is_kept_and_the_decision_is_repeatable(snapshot: Snapshot) -> None:
    actions = decide(snapshot)
    assert actions == decide(snapshot)
    for place, queue in snapshot.waiting.items():
        chosen = [a.job for a in actions if a.stage == place[0] and a.job in {t.job for t in queue}]
        assert chosen == [task.job for task in queue if task.job in chosen]
