"""Whatever memory does, tasks come nearer to their end or end with a reason: the engine with its ledger and scheduler,
driven without sockets by workers that keep bytes, grow, leak, refuse leases and need more than was thought."""

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dispatch.leasing import stuck
from orchestrator.dispatch.standstill import TICK_SECONDS, quiet_ticks
from orchestrator.job import ModelKey
from orchestrator.memory.lease_sizes import Need
from orchestrator.memory.margins import FIRST_HEADROOM
from orchestrator.principal import LOCAL_USER
from orchestrator.scheduling.scheduler import decide
from orchestrator.scheduling.snapshot import (
    ChangeLease,
    GpuDemand,
    GpuSpace,
    IdleWorker,
    LeasedWorker,
    Place,
    Snapshot,
    WaitingTask,
)
from protocol.errors import DoesNotFit
from protocol.gpu_memory import GpuId, Lease, WeightNeed
from protocol.job import JobRequest
from protocol.messages.worker import (
    Leased,
)
from protocol.model import ModelDescription
from protocol.stages import STAGES, Stage
from tests.chance import examples
from tests.fakes import MODEL
from tests.memory_world import Sim, World

MB = 10**6
GB = 10**9
KEY = ModelKey("m", "bfloat16")
sizes = st.integers(20, 4000).map(lambda megabytes: megabytes * MB)


@st.composite
def sims(draw: st.DrawFn, stage: Stage) -> Sim:
    weights = draw(sizes)
    workspace = draw(sizes)
    keeps = draw(st.lists(st.integers(0, 400).map(lambda mb: mb * MB), max_size=5))
    leaks = draw(st.booleans())
    return Sim(
        stage=stage,
        needs=WeightNeed(weights=weights, least=draw(st.integers(1, weights)), workspace=workspace),
        takes=int(workspace * draw(st.sampled_from([0.2, 0.9, 1.0, 1.3, 2.5]))),
        context=draw(st.integers(0, 600)) * MB,
        keeps=sorted(keeps) if leaks else keeps,
        refuses=draw(st.integers(0, 4)),
        lends=draw(st.sampled_from([True, True, False])),
        dies=draw(st.sampled_from([0, 0, 1])),
        dies_at_work=draw(st.sampled_from([0, 0, 1])),
    )


@examples(150)
@given(
    workers=st.tuples(*(sims(stage) for stage in STAGES)),
    budget=st.integers(1000, 16000).map(lambda mb: mb * MB),
    count=st.integers(1, 6),
    driver=st.booleans(),
    others=st.lists(st.integers(0, 3000).map(lambda mb: mb * MB), min_size=1, max_size=4),
)
def test_every_task_is_done_or_ends_with_a_reason(
    workers: tuple[Sim, ...], budget: int, count: int, driver: bool, others: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(budget, list(workers), Path(folder), driver, others)
        try:
            jobs = world.submit(count)
        except DoesNotFit:
            return  # refused at the door, which is an end, too
        jobs = world.run(jobs, 3000)
        assert all(job.ended for job in jobs), [job.stage for job in jobs]
        assert all(job.reasons for job in jobs if job.state == "failed")
        assert world.orders <= 150 * (count + 2)


DIGESTS: tuple[tuple[Stage, str], ...] = (("text", "same"), ("vae", "same"))
ONE = MODEL.model_copy(update={"worker_digests": DIGESTS})
OTHER = MODEL.model_copy(update={"model": "other", "revision": "other", "worker_digests": DIGESTS})


@st.composite
def sharing(draw: st.DrawFn) -> list[Sim]:
    """Two models that share text encoders and VAE; the processes of each have their own troubles."""
    found: list[Sim] = []
    for stage in STAGES:
        one, other = draw(sims(stage)), draw(sims(stage))
        if stage != "denoise":
            other = replace(other, needs=one.needs, takes=one.takes)
        found += [replace(one, model=ONE), replace(other, model=OTHER)]
    return found


@examples(150)
@given(workers=sharing(), budget=st.integers(1000, 16000).map(lambda mb: mb * MB), count=st.integers(1, 8))
def test_every_task_of_models_that_share_stages_is_done_or_ends_with_a_reason(
    workers: list[Sim], budget: int, count: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(budget, workers, Path(folder))
        try:
            jobs = world.submit(count, models=(MODEL.model, "other"))
        except DoesNotFit:
            return
        jobs = world.run(jobs, 3000)
        assert all(job.ended for job in jobs), [(job.stage, job.recipe.model) for job in jobs if not job.ended]
        assert all(job.reasons for job in jobs if job.state == "failed")
        assert world.orders <= 200 * (count + 2)


def easy(stage: Stage, model: ModelDescription, takes: int = 10 * MB) -> Sim:
    return Sim(stage, WeightNeed(weights=20 * MB, least=20 * MB, workspace=10 * MB), takes, 0, model=model)


def test_a_model_that_can_not_go_on_holds_up_none_that_shares_its_text_encoder(tmp_path: Path) -> None:
    """Its denoiser is not there, and as many of its prompts are encoded as may wait beyond."""
    workers = [easy("text", ONE), *(easy(stage, OTHER) for stage in STAGES)]
    world = World(GB, workers, tmp_path)
    stuck = world.submit(100, models=(MODEL.model,))
    for _ in range(200):
        world.round()
    assert {job.stage for job in world.as_they_are(stuck)} == {"text", "denoise"}
    (job,) = world.run(world.submit(1, models=("other",)), 100)
    assert job.state == "done"
    assert len({job.id for job in stuck} & world.engine.job_queue.jobs.keys()) == 100


def test_what_a_task_takes_is_learned_for_all_models_that_share_its_stage(tmp_path: Path) -> None:
    workers = [easy("text", ONE), easy("denoise", ONE), easy("vae", ONE, takes=100 * MB), easy("vae", OTHER)]
    world = World(GB, workers, tmp_path)
    (job,) = world.run(world.submit(1), 100)
    assert job.state == "done"
    workspaces = {
        sim.worker.model: world.engine.leasing.ledger.workspace("vae", sim.worker.model, job.recipe, sim.needs)
        for sim in workers
        if sim.worker
    }
    assert len(workspaces) == 2
    assert min(workspaces.values()) >= 100 * MB


def test_a_worker_that_can_do_nothing_fails_jobs_of_its_own_model_alone(tmp_path: Path) -> None:
    """Those of others that share its stage wait for their own workers, which may be about to come."""
    hopeless = replace(easy("text", ONE), needs=WeightNeed(weights=2 * GB, least=2 * GB, workspace=0))
    world = World(GB, [easy("denoise", ONE), easy("denoise", OTHER), easy("vae", ONE), easy("vae", OTHER)], tmp_path)
    mine, others = world.submit(1, models=(MODEL.model,)), world.submit(1, models=("other",))
    world.sims.append(hopeless)
    world.join(hopeless)
    for _ in range(50):
        world.round()
    assert [job.state for job in world.as_they_are(mine)] == ["failed"]
    assert [job.ended for job in world.as_they_are(others)] == [False]
    world.sims.append(own := easy("text", OTHER))
    world.join(own)
    assert [job.state for job in world.run(others, 100)] == ["done"]


def test_other_programs_leave_the_denoiser_less_and_nobody_waits_for_them(tmp_path: Path) -> None:
    """A turn is all that there is, so one byte that the driver counts beside the book was one too many."""
    workers = [
        Sim("text", WeightNeed(weights=14_200 * MB, least=2900 * MB, workspace=600 * MB), 475 * MB, 0),
        Sim("denoise", WeightNeed(weights=41_000 * MB, least=2000 * MB, workspace=1600 * MB), 1300 * MB, 0),
        Sim("vae", WeightNeed(weights=250 * MB, least=250 * MB, workspace=3430 * MB), 3000 * MB, 0),
    ]
    world = World(4117 * MB + 3 * FIRST_HEADROOM, workers, tmp_path, driver=True, others=(700 * MB, 701 * MB))
    jobs = world.submit(3)
    jobs = world.run(jobs, 40)
    assert [job.state for job in jobs] == ["done"] * 3


def test_workers_that_keep_a_little_do_not_keep_the_denoiser_from_its_turn(tmp_path: Path) -> None:
    """Qwen-Image's sizes in a third of 16 GB, where leases of nothing went to and fro 400 times a second."""
    little = [2 << 20]
    workers = [
        Sim("text", WeightNeed(weights=7260 * MB, least=700 * MB, workspace=600 * MB), 475 * MB, 0, little),
        Sim("denoise", WeightNeed(weights=13_700 * MB, least=900 * MB, workspace=1600 * MB), 1300 * MB, 0, little),
        Sim("vae", WeightNeed(weights=250 * MB, least=20 * MB, workspace=3430 * MB), 3000 * MB, 0, little),
    ]
    world = World(8262 * MB + 3 * FIRST_HEADROOM, workers, tmp_path)
    jobs = world.submit(3)
    jobs = world.run(jobs, 200)
    assert [job.state for job in jobs] == ["done"] * 3
    assert world.orders < 30
    assert not world.restarts


def test_the_smallest_input_of_leases_that_spin(tmp_path: Path) -> None:
    """With nothing in a lease, what is kept being its GPU's own matter, the denoiser is lent all that there is."""
    needs: dict[Stage, Need] = {
        "text": Need(7260 * MB, 700 * MB, 475 * MB),
        "vae": Need(250 * MB, 20 * MB, 3450 * MB),
        "denoise": Need(13_700 * MB, 900 * MB, 5000 * MB),
    }
    available = 8262 * MB
    holders = {
        stage: LeasedWorker(stage, stage, KEY, {0: GpuDemand(need)}, most=available) for stage, need in needs.items()
    }
    idle = [IdleWorker(stage, stage, KEY) for stage in STAGES]
    waiting = {("denoise", KEY): [WaitingTask("a", "denoise", KEY, 2, 5000 * MB)]}
    snapshot = Snapshot(waiting, idle, {("denoise", KEY, 2): 1}, holders, {0: GpuSpace(available, available)})
    (lend,) = decide(snapshot)
    assert isinstance(lend, ChangeLease)
    assert (lend.worker, lend.bytes) == ("denoise", available)


def test_a_model_without_jobs_rests_where_its_contexts_leave_another_no_room(tmp_path: Path) -> None:
    other = MODEL.model_copy(update={"model": "other", "revision": "other"})
    idle = [replace(sim, model=other, context=GB) for sim in three(least=GB)]
    world = World(12 * GB, [*three(least=8 * GB), *idle], tmp_path)
    jobs = world.run(world.submit(2), 500)
    assert [job.state for job in jobs] == ["done"] * 2
    assert world.rested == 3


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_jobs_that_wait_for_a_model_do_not_fail_while_another_is_about_to_rest(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    """Whichever of its workers is ready first, and finds no room."""
    other = MODEL.model_copy(update={"model": "other", "revision": "other"})
    idle = [replace(sim, model=other, context=GB) for sim in three(least=GB)]
    mine = three(least=8 * GB)
    world = World(12 * GB, [mine[1], *idle], tmp_path)
    jobs = world.submit(2)
    for place in order:
        if place != 1:
            world.sims.append(mine[place])
            world.join(mine[place])
    jobs = world.run(jobs, 500)
    assert [job.state for job in jobs] == ["done"] * 2


def test_a_size_that_never_fits_is_refused_beside_another_model_too(tmp_path: Path) -> None:
    other = MODEL.model_copy(update={"model": "other", "revision": "other"})
    idle = [replace(sim, model=other, context=GB // 10) for sim in three(least=GB)]
    mine = three(least=8 * GB)
    world = World(16 * GB, [*mine, *idle], tmp_path)
    (job,) = world.run(world.submit(1), 100)
    assert job.state == "done"
    denoiser = mine[1].worker
    assert denoiser
    world.engine.leasing.learn(denoiser, job.recipe, 30 * GB)
    with pytest.raises(DoesNotFit, match="can be had"):
        world.submit(1)


def test_what_can_never_be_lent_ends_with_an_account_and_others_go_on(tmp_path: Path) -> None:
    """Somebody else's memory, which the stack can't take back, is in the way of the denoiser alone."""
    world = World(12 * GB, three(least=8 * GB), tmp_path, driver=True)
    stranger = Sim("vae", WeightNeed(weights=0, least=0, workspace=0), 0, 6 * GB)
    world.sims.append(stranger)
    (job,) = world.submit(1)
    (job,) = world.run([job], 500)
    assert job.state == "failed"
    account = job.reasons[-1]
    for part in ("denoise-1 needs at least 8.0 GB", "GPU 0", "by its driver's count", "would help"):
        assert part in account
    world.sims.remove(stranger)
    (other,) = world.submit(1, width=512)
    (other,) = world.run([other], 500)
    assert other.state == "done"


def three(least: int) -> list[Sim]:
    return [
        Sim("text", WeightNeed(weights=GB, least=GB, workspace=100 * MB), 50 * MB, 0),
        Sim("denoise", WeightNeed(weights=9 * GB, least=least, workspace=GB), GB // 2, 0),
        Sim("vae", WeightNeed(weights=100 * MB, least=100 * MB, workspace=300 * MB), 200 * MB, 0),
    ]


def test_what_becomes_free_after_a_while_is_lent_and_no_job_fails(tmp_path: Path) -> None:
    world = World(12 * GB, three(least=8 * GB), tmp_path, driver=True, others=(6 * GB,))
    (job,) = world.submit(1)
    (job,) = world.run([job], 60)
    assert job.stage == "denoise"
    world.others = (0,)
    (job,) = world.run([job], 10)
    assert (job.state, job.reasons) == ("done", ())


def test_jobs_of_a_drained_stage_wait_and_its_memory_is_others(tmp_path: Path) -> None:
    world = World(11 * GB, three(least=9 * GB), tmp_path)
    world.run(world.submit(1), 40)
    world.engine.drain("denoise", on=True)
    (job,) = world.engine.accept((JobRequest(prompt="another", seed=1, width=1024, height=1024),), LOCAL_USER)
    (job,) = world.run([job], 300)
    assert (job.stage, job.worker, job.reasons) == ("denoise", None, ())
    world.engine.drain("denoise", on=False)
    (job,) = world.run([job], 40)
    assert job.state == "done"


def test_a_long_patience_is_waited_for() -> None:
    need = Need(GB, GB, GB)
    holder = LeasedWorker("d", "denoise", KEY, {0: GpuDemand(need)})
    spaces = {0: GpuSpace(3 * GB, 3 * GB)}
    waiting = {("denoise", KEY): [WaitingTask("a", "denoise", KEY, 2, GB)]}
    snapshot = Snapshot(
        waiting, [IdleWorker("d", "denoise", KEY)], {("denoise", KEY, 2): 1}, {"d": holder}, spaces, patience=500
    )
    assert quiet_ticks(snapshot, {"d"}) * TICK_SECONDS > 500


def test_a_worker_that_keeps_more_and_more_is_started_anew_and_no_job_is_to_blame(tmp_path: Path) -> None:
    leak = [n * 100 * MB for n in range(1, 40)]
    workers = [
        Sim("text", WeightNeed(weights=5 * GB, least=5 * GB, workspace=GB), GB // 2, 0, leak),
        Sim("denoise", WeightNeed(weights=6 * GB, least=6 * GB, workspace=GB), GB // 2, 0),
        Sim("vae", WeightNeed(weights=100 * MB, least=100 * MB, workspace=GB), GB // 2, 0),
    ]
    world = World(9 * GB, workers, tmp_path)
    for number in range(8):
        (job,) = world.engine.accept((JobRequest(prompt=f"p {number}", seed=1, width=1024, height=1024),), LOCAL_USER)
        (job,) = world.run([job], 200)
        assert (job.state, job.reasons) == ("done", ())
    assert world.restarts == 2


def test_an_answer_that_is_not_what_was_asked_loses_the_worker(tmp_path: Path) -> None:
    workers = [Sim("text", WeightNeed(weights=GB, least=GB, workspace=GB), GB // 2, 0)]
    world = World(9 * GB, workers, tmp_path)
    world.submit(1)
    world.engine.assign()
    worker = workers[0].worker
    assert worker
    world.engine.leased(worker, Leased(leases=(Lease(bytes=1, weight_bytes=1),), kept_bytes=(0,)))
    assert worker not in list(world.engine.fleet)


def test_where_contexts_alone_take_more_than_there_is_jobs_end_with_a_reason(tmp_path: Path) -> None:
    nothing = WeightNeed(weights=1, least=1, workspace=0)
    mine = [replace(sim, context=GB, takes=0, needs=nothing) for sim in three(1)]
    others = [replace(sim, context=GB // 10, model=OTHER) for sim in mine]  # which may rest
    (job,) = (world := World(GB, [*mine, *others], tmp_path)).submit(1)
    (job,) = world.run([job], 200)
    assert job.state == "failed"
    assert job.reasons


def test_a_lease_that_is_refused_is_held_against_no_job_of_another_model(tmp_path: Path) -> None:
    refusing = replace(easy("text", ONE), refuses=2)
    workers = [refusing, *(easy(stage, OTHER) for stage in STAGES if stage != "text"), easy("denoise", ONE)]
    world = World(GB, workers, tmp_path)
    (other,) = world.submit(1, models=("other",))
    (job,) = world.run([other], 200)
    assert (job.state, job.reasons) == ("done", ())
    assert not refusing.refuses


def test_of_those_that_wait_in_vain_one_is_named_that_could_start_and_whose_worker_is_there() -> None:
    """Not one that waits for its model's other jobs, nor one whose own worker is to come."""
    one, other, third = (ModelKey(name, "bfloat16") for name in "abc")
    place: Place = ("text", one)
    common = {("text", model): place for model in (one, other, third)}
    need = {GpuId("h", 0): GpuDemand(Need(1, 1, 1))}
    holders = {name: LeasedWorker(name, "text", model, need) for name, model in (("w1", one), ("w2", other))}
    tasks = [WaitingTask(f"job of {model.revision}", "text", model, 3) for model in (one, third, other)]
    depth = {("denoise", one, 2): 1000, **{("text", model, 3): 1 for model in (one, other, third)}}
    snapshot = Snapshot({place: tasks}, [], depth, holders, {GpuId("h", 0): GpuSpace(1, 1)}, common=common)
    assert stuck(snapshot, place) == ["job of b"]
