"""The scheduler is a pure function: every idle worker gets the first task that fits, and none twice."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.job import ModelKey
from orchestrator.scheduling.scheduler import AHEAD, IdleWorker, Snapshot, WaitingTask, decide
from protocol.stages import STAGES, Stage

MODELS = (ModelKey("a", "float32"), ModelKey("a", "bfloat16"), ModelKey("b", "float32"))
PLACES = st.tuples(st.sampled_from(STAGES), st.sampled_from(MODELS))


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    idle = [IdleWorker(f"w{i}", *place) for i, place in enumerate(draw(st.lists(PLACES, max_size=12)))]
    waiting: dict[tuple[Stage, ModelKey], list[WaitingTask]] = {}
    for i, (stage, model) in enumerate(draw(st.lists(PLACES, max_size=20))):
        waiting.setdefault((stage, model), []).append(WaitingTask(f"j{i}", stage, model))
    depth = {stage: draw(st.integers(0, 300)) for stage in STAGES}
    return Snapshot(waiting, idle, depth)


@given(snapshots())
def test_no_task_and_no_worker_is_used_twice_and_all_fit(snapshot: Snapshot) -> None:
    actions = decide(snapshot)
    workers = {worker.id: worker for worker in snapshot.idle}
    tasks = {task.job: task for queue in snapshot.waiting.values() for task in queue}
    assert len({action.worker for action in actions}) == len(actions) == len({action.job for action in actions})
    for action in actions:
        assert workers[action.worker].model == tasks[action.job].model
        assert workers[action.worker].stage == tasks[action.job].stage == action.stage


@given(snapshots())
def test_nobody_idles_beside_work_unless_the_next_stage_is_full(snapshot: Snapshot) -> None:
    actions = decide(snapshot)
    busy, given_out = {a.worker for a in actions}, {a.job for a in actions}
    started = {stage: sum(a.stage == stage for a in actions) for stage in STAGES}
    for worker in snapshot.idle:
        left = [t for t in snapshot.waiting.get((worker.stage, worker.model), ()) if t.job not in given_out]
        if worker.id not in busy and left:
            following = STAGES[STAGES.index(worker.stage) + 1]
            assert snapshot.depth[following] + started[worker.stage] >= AHEAD[worker.stage]


@given(snapshots())
def test_order_is_kept_and_the_decision_is_repeatable(snapshot: Snapshot) -> None:
    actions = decide(snapshot)
    assert actions == decide(snapshot)
    for place, queue in snapshot.waiting.items():
        chosen = [a.job for a in actions if a.stage == place[0] and a.job in {t.job for t in queue}]
        assert chosen == [task.job for task in queue[: len(chosen)]]
