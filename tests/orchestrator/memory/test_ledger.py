"""Leases of a GPU: pure arithmetic and pure scheduling, held to their promises by chance and by cases."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.job import ModelKey
from orchestrator.memory.lease_sizes import LeaseSize, Loan, Need, lease_sizes
from orchestrator.memory.ledger import Account, Holding, Ledger
from orchestrator.memory.margins import FIRST_HEADROOM, HEADROOM
from orchestrator.scheduling.scheduler import decide
from orchestrator.scheduling.snapshot import (
    NOTHING,
    Action,
    Assign,
    ChangeLease,
    GpuDemand,
    GpuSpace,
    IdleWorker,
    LeasedWorker,
    Line,
    Place,
    ReturnLoan,
    Snapshot,
    TakeLoan,
    WaitingTask,
    line_of,
)
from protocol.gpu_memory import Lease, WeightNeed
from protocol.job import Recipe
from protocol.stages import STAGES, TRAITS, USUAL_NEXT, Stage, StageTraits
from tests.chance import examples

MODEL = ModelKey("m", "bfloat16")
GB = 10**9
# FLUX.1-dev, in bf16
FLUX: dict[Stage, Need] = {
    "text": Need(9_780_000_000, 900_000_000, 600_000_000),
    "denoise": Need(23_800_000_000, 1_500_000_000, 600_000_000),
    "vae": Need(170_000_000, 170_000_000, 2_700_000_000),
}


LENDING = {
    stage: replace(need, lends=TRAITS[stage].lends, momentary=TRAITS[stage].momentary) for stage, need in FLUX.items()
}


@st.composite
def needs(draw: st.DrawFn) -> Need:
    weights = draw(st.integers(1, 1000))
    return Need(weights, draw(st.integers(1, weights)), draw(st.integers(0, 300)))


@given(
    available=st.integers(0, 3000),
    wanted=st.dictionaries(st.sampled_from("abcde"), needs(), min_size=1),
    spread=st.sets(st.sampled_from("abcde")),
)
def test_what_is_held_beside_fits_together_and_any_turn_with_it(
    available: int, wanted: dict[str, Need], spread: set[str]
) -> None:
    wanted = {name: replace(need, spread=name in spread) for name, need in wanted.items()}
    found = lease_sizes(available, wanted)
    shared = sum(lease_size.shared for lease_size in found.values())
    first = sum(lease_size.shared for name, lease_size in found.items() if name in spread)
    assert shared <= available
    for name, lease_size in found.items():
        need = wanted[name]
        assert lease_size.exclusive == 0 or need.small <= lease_size.exclusive <= min(need.whole, available)
        assert lease_size.shared == 0 or need.small <= lease_size.shared <= need.whole
        assert (lease_size.exclusive == 0) == (need.small > available)
        if lease_size.exclusive > need.small and lease_size.shared == 0:
            alone = {min(need.whole, available), min(need.whole, available - first)}
            assert lease_size.exclusive + shared <= available or lease_size.exclusive in alone
    if sum(need.whole for need in wanted.values()) <= available:
        assert all(found[name].shared == found[name].exclusive == wanted[name].whole for name in wanted)


def test_on_16_gb_the_vae_stays_and_text_streams_beside_the_denoiser() -> None:
    found = lease_sizes(int(14.5 * GB), {**FLUX})
    assert found["vae"].shared == FLUX["vae"].whole
    assert found["text"].shared == FLUX["text"].small
    assert found["denoise"].exclusive == int(14.5 * GB) - found["vae"].shared - found["text"].shared
    small = lease_sizes(6 * GB, {**FLUX})
    assert all(lease_size.shared == 0 for lease_size in small.values())
    assert small["denoise"].exclusive == 6 * GB


def test_what_takes_a_moment_holds_nothing_beside_a_denoiser_that_lends() -> None:
    found = lease_sizes(int(14.5 * GB), {**LENDING})
    assert found["vae"] == LeaseSize(0, LENDING["vae"].whole, borrows=True)
    assert found["text"] == LeaseSize(0, LENDING["text"].whole, borrows=True)
    assert found["denoise"] == LeaseSize(0, int(14.5 * GB))
    small = lease_sizes(6 * GB, {**LENDING})  # of an 8 GiB card, contexts aside
    assert (small["vae"].borrows, small["denoise"].exclusive) == (True, 6 * GB)
    assert not lease_sizes(4 * GB, {**LENDING})["vae"].borrows  # what the denoiser can't lend is had by turns
    assert not lease_sizes(40 * GB, {**LENDING})["vae"].borrows  # all are in


@dataclass
class World:
    """A stack that is moved on by the scheduler alone; a tick is a second."""

    available: dict[int, int]  # by GPU
    needs: dict[str, Need]  # by worker, whose name begins with its stage; on each of its GPUs
    gpus: dict[str, tuple[int, ...]]  # by worker
    queues: dict[Stage, list[tuple[str, int, int]]] = field(default_factory=dict)  # (job, workspace, since)
    jobs: dict[str, int] = field(default_factory=dict)  # by worker, at once; 1
    held: dict[str, tuple[Lease, ...]] = field(default_factory=dict)
    busy: dict[tuple[str, int], tuple[str, int] | ChangeLease] = field(default_factory=dict)  # by worker and hand
    since: dict[str, int] = field(default_factory=dict)
    now: int = 0
    done: list[str] = field(default_factory=list)
    swaps: int = 0
    worked: dict[str, int] = field(default_factory=dict)  # by worker: when it last had a task
    came_in: Counter[str] = field(default_factory=Counter)  # times, by worker
    patience: float = 30.0
    lasting: bool = False
    ahead: dict[Stage, int] = field(default_factory=lambda: {stage: TRAITS[stage].ahead for stage in STAGES})
    routes: dict[str, tuple[Stage, ...]] = field(default_factory=dict)  # by job: what is still to come
    loans: dict[str, Loan] = field(default_factory=dict)  # by lender
    lent: int = 0  # loans that there were
    lent_since: dict[str, int] = field(default_factory=dict)  # by lender
    called_back: dict[str, int] = field(default_factory=dict)  # by lender: when a loan of too long came back
    unable: set[str] = field(default_factory=set)  # to lend, as it turns out
    cannot_lend: set[str] = field(default_factory=set)  # as is known
    of: dict[str, str] = field(default_factory=dict)  # by job: the model, whose workers are named 'stage/model'
    common: set[Stage] = field(default_factory=set)  # that all models have in common

    def __post_init__(self) -> None:
        self.held = {worker: (NOTHING,) * len(gpus) for worker, gpus in self.gpus.items()} | self.held

    def stage(self, worker: str) -> Stage:
        return next(stage for stage in STAGES if worker.startswith(stage))

    def model(self, worker: str) -> ModelKey:
        return model_key(worker.partition("/")[2])

    def workspace(self, stage: Stage, model: str = "") -> int:
        mine = [need for w, need in self.needs.items() if w.startswith(stage) and w.partition("/")[2] == model]
        return mine[0].workspace

    def booked(self) -> dict[str, tuple[int, ...]]:
        coming = {worker: doing.leases for (worker, _), doing in self.busy.items() if isinstance(doing, ChangeLease)}
        return {
            worker: tuple(
                max(now.bytes, then.bytes) - self._given(worker)
                for now, then in zip(held, coming.get(worker, held), strict=True)
            )
            for worker, held in self.held.items()
        }

    def _given(self, worker: str) -> int:
        loan = self.loans.get(worker)
        return loan.bytes if loan and loan.given else 0

    def on(self, gpu: int) -> int:
        booked = self.booked()
        return sum(booked[worker][gpus.index(gpu)] for worker, gpus in self.gpus.items() if gpu in gpus)

    def hands(self, worker: str) -> int:
        return self.jobs.get(worker, 1)

    def snapshot(self) -> Snapshot:
        booked = self.booked()
        holders = {
            w: LeasedWorker(
                w,
                self.stage(w),
                self.model(w),
                {
                    gpu: GpuDemand(self._need(w, held), size, held.weight_bytes)
                    for gpu, held, size in zip(self.gpus[w], self.held[w], booked[w], strict=True)
                },
                self.hands(w),
                self.now - self.since.get(w, 0),
                lasting=self.lasting,
                most=min((self.available[gpu] - self.needs[w].least) // self.hands(w) for gpu in self.gpus[w]),
                lendable=self.lendable(w),
                loan=self.loans.get(w),
                lent_for=self.now - self.lent_since.get(w, self.now) if w in self.loans else 0.0,
                back_for=self.now - self.called_back.get(w, -math.inf),
                idle_for=self.now - self.worked.get(w, 0),
                busy=any(who == w and not isinstance(doing, ChangeLease) for (who, _), doing in self.busy.items()),
            )
            for w in self.needs
        }
        waiting: dict[tuple[Stage, ModelKey], list[WaitingTask]] = {}
        for stage, queue in self.queues.items():
            for j, ws, since in queue:
                model = model_key(self.of.get(j, ""))
                task = WaitingTask(j, stage, model, self.distance(j, stage), ws, self.now - since)
                waiting.setdefault(self.common_places().get((stage, model), (stage, model)), []).append(task)
        for tasks in waiting.values():
            tasks.sort(key=lambda task: task.distance)
        swapping = {worker for (worker, _), doing in self.busy.items() if isinstance(doing, ChangeLease)}
        idle = [
            IdleWorker(f"{w}.{hand}" if hand else w, self.stage(w), self.model(w), w)
            for w in self.needs
            for hand in range(self.hands(w))
            if (w, hand) not in self.busy and w not in swapping and w not in self.loans
        ]
        depth: Counter[Line] = Counter()
        for tasks in waiting.values():
            depth.update(map(line_of, tasks))
        spaces = {gpu: GpuSpace(size, size - self.on(gpu)) for gpu, size in self.available.items()}
        return Snapshot(waiting, idle, depth, holders, spaces, self.patience, self.ahead, self.common_places())

    def common_places(self) -> dict[Place, Place]:
        models = sorted({self.model(worker) for worker in self.needs}, key=str)
        return {(stage, model): (stage, models[0]) for stage in self.common for model in models}

    def lendable(self, worker: str) -> int:
        (held, *others), need = self.held[worker], self.needs[worker]
        able = need.lends and not others and worker not in self.cannot_lend
        changing = any(who == worker and isinstance(doing, ChangeLease) for (who, _), doing in self.busy.items())
        return max(0, held.bytes - self._need(worker, held).between_steps) if able and not changing else 0

    def _need(self, worker: str, held: Lease) -> Need:
        need, hands = self.needs[worker], self.hands(worker)
        space = held.bytes - held.weight_bytes if held.bytes else need.workspace * hands
        alone = len(self.gpus[worker]) == hands == 1
        return replace(
            need, workspace=space, spread=len(self.gpus[worker]) > 1, lends=need.lends and alone,
            momentary=need.momentary and alone,
        )  # fmt: skip

    def tick(self) -> None:
        for worker, loan in list(self.loans.items()):
            if worker in self.unable:
                self.cannot_lend.add(worker)
                del self.loans[worker]
            elif not loan.given:
                self.loans[worker], self.lent_since[worker] = replace(loan, given=True), self.now
        for (worker, hand), doing in list(self.busy.items()):
            if worker in self.loans:
                continue  # it goes on once it has back what it has lent
            del self.busy[worker, hand]
            if isinstance(doing, ChangeLease):
                self.held[worker], self.since[worker] = doing.leases, self.now
            else:
                self.worked[worker] = self.now
                self._finish(self.stage(worker), *doing)
        for action in decide(snapshot := self.snapshot()):
            worker, _, which = action.worker.partition(".")
            hand = int(which or 0)
            if isinstance(action, TakeLoan | ReturnLoan):
                self._loan(action)
                continue
            assert worker not in self.loans, "a lender is given something to do"
            assert (worker, hand) not in self.busy
            if isinstance(action, ChangeLease):
                assert not any(who == worker for who, _ in self.busy), "a lease is changed beside a job"
                self._lend(snapshot, action)
            else:
                self._assign(action, worker, hand)
        for gpu, size in self.available.items():
            assert self.on(gpu) <= size, "the budget is passed"
        self.now += 1

    def _loan(self, action: TakeLoan | ReturnLoan) -> None:
        if isinstance(action, ReturnLoan):
            loan, (held,) = self.loans.pop(action.worker), self.held[action.worker]
            assert loan.given, "what was not lent yet is returned"
            if self.now - self.lent_since.get(action.worker, self.now) > self.patience:
                self.called_back[action.worker] = self.now
            assert action.missing == 0, "nobody keeps anything here"
            self.held[action.worker] = (held.model_copy(update={"bytes": held.bytes - action.missing}),)
            return
        assert action.worker not in self.loans, "a loan beside another"
        assert 0 < action.bytes <= self.lendable(action.worker)
        self.loans[action.worker] = Loan(action.bytes)
        self.lent += 1

    def _lend(self, snapshot: Snapshot, lend: ChangeLease) -> None:
        need = self.needs[lend.worker]
        self.swaps += lend.bytes > 0
        self.came_in[lend.worker] += bool(lend.bytes and not any(lease.bytes for lease in self.held[lend.worker]))
        for lease in lend.leases:
            assert lease.weight_bytes <= lease.bytes
            assert (lease.bytes > 0) == (lend.bytes > 0), "on some of its GPUs only"
            assert not lease.bytes or need.least <= lease.weight_bytes <= need.weights
        if not lend.bytes:
            others = [h for h in snapshot.holders.values() if h.id != lend.worker]
            here = [h for h in others if {*h.demands} & {*self.gpus[lend.worker]}]
            busy = {worker for worker, _ in self.busy}
            blocked = [h for h in here if snapshot.waiting.get(snapshot.place(h)) and h.id not in busy]
            assert blocked or self.loans, f"{lend.worker} was sent away for nobody"
        self.busy[lend.worker, 0] = lend

    def _assign(self, action: Assign, worker: str, hand: int) -> None:
        queue = self.queues[action.stage]
        task = next(task for task in queue if task[0] == action.job)
        queue.remove(task)
        for held in self.held[worker]:
            assert task[1] * self.hands(worker) <= held.bytes - held.weight_bytes, "a task without room"
        self.busy[worker, hand] = (task[0], task[1])

    def distance(self, job: str, stage: Stage) -> int:
        return len(self.routes[job]) + 1 if job in self.routes else TRAITS[stage].distance

    def _finish(self, stage: Stage, job: str, workspace: int) -> None:
        following = USUAL_NEXT[stage]
        if job in self.routes:
            following, *rest = (*self.routes[job], None)
            self.routes[job] = tuple(rest[:-1])
        if following is None:
            self.done.append(job)
        else:
            space = self.workspace(following, self.of.get(job, ""))
            self.queues.setdefault(following, []).append((job, space, self.now))


def model_key(name: str) -> ModelKey:
    return ModelKey(name, "bfloat16") if name else MODEL


@st.composite
def needs_of(draw: st.DrawFn, stage: Stage) -> Need:
    traits = TRAITS[stage] if draw(st.booleans()) else StageTraits((), 0, 0)
    return replace(draw(needs()), lends=traits.lends, momentary=traits.momentary)


def one_gpu(available: int, wanted: dict[Stage, Need]) -> World:
    return World({0: available}, {**wanted}, dict.fromkeys(wanted, (0,)))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    wanted = {stage: draw(needs_of(stage)) for stage in STAGES}
    least = max(need.small for need in wanted.values())
    world = one_gpu(draw(st.integers(least, least + sum(need.whole for need in wanted.values()))), wanted)
    world.patience = draw(st.sampled_from([3.0, 30.0]))
    world.lasting = draw(st.booleans())
    world.unable = draw(st.sampled_from([set(), set(), {"denoise"}]))
    return world


@st.composite
def many_gpus(draw: st.DrawFn) -> World:
    """Each stage has a worker on at least one of them; every worker can do its stage's tasks with a GPU to itself."""
    wanted = {stage: draw(needs_of(stage)) for stage in STAGES}
    count = draw(st.integers(1, 4))
    chosen = draw(st.sets(st.integers(0, count - 1), min_size=1))
    jobs: dict[str, int] = {}
    if draw(st.booleans()):
        gpus: dict[str, tuple[int, ...]] = {"denoise": tuple(chosen)}
        jobs["denoise"] = draw(st.integers(1, 2))
    else:
        gpus = {f"denoise-{n}": (n,) for n in chosen}
    gpus |= {stage: (draw(st.integers(0, count - 1)),) for stage in ("text", "vae")}
    if draw(st.booleans()):
        gpus["vae-2"] = (draw(st.integers(0, count - 1)),)
    wants = {worker: wanted[next(s for s in STAGES if worker.startswith(s))] for worker in gpus}
    everything = sum(need.whole for need in wants.values())
    available = {}
    for n in range(count):
        here = [worker for worker, at in gpus.items() if n in at]
        least = max((wants[w].least + wants[w].workspace * jobs.get(w, 1) for w in here), default=0)
        available[n] = draw(st.integers(least, least + everything))
    patience, lasting = draw(st.sampled_from([3.0, 30.0])), draw(st.booleans())
    return World(available, wants, gpus, jobs=jobs, patience=patience, lasting=lasting)


@examples(300)
@given(world=worlds() | many_gpus(), arrivals=st.lists(st.integers(0, 60), max_size=12))
def test_no_budget_is_passed_and_all_jobs_get_done(world: World, arrivals: list[int]) -> None:
    for number, at in enumerate(sorted(arrivals)):
        while world.now < at:
            world.tick()
        world.queues.setdefault("text", []).append((f"j{number}", world.workspace("text"), world.now))
    for _ in range(2000):
        if len(world.done) == len(arrivals):
            break
        world.tick()
    assert sorted(world.done) == sorted(f"j{number}" for number in range(len(arrivals)))


@examples(40)
@given(
    world=worlds() | many_gpus(),
    routes=st.lists(st.lists(st.sampled_from(STAGES), min_size=1, max_size=6), min_size=1, max_size=12),
    limit=st.integers(1, 4),
)
def test_jobs_of_mixed_routes_neither_deadlock_nor_thrash(world: World, routes: list[list[Stage]], limit: int) -> None:
    """Stages visited in any order, and more than once, with next to no room to run ahead."""
    world.ahead = dict.fromkeys(STAGES, limit)
    world.patience = 1e9  # nobody is sent away in the middle of a queue
    for number, (first, *rest) in enumerate(routes):
        world.routes[f"j{number}"] = tuple(rest)
        world.queues.setdefault(first, []).append((f"j{number}", world.workspace(first), 0))
    for _ in range(4000):
        if len(world.done) == len(routes):
            break
        world.tick()
    assert sorted(world.done) == sorted(f"j{number}" for number in range(len(routes)))
    assert world.swaps <= 2 * sum(map(len, routes)) + len(world.needs)


@examples(40)
@given(world=worlds(), jobs=st.integers(1, 20))
def test_jobs_that_come_together_need_one_turn_a_stage(world: World, jobs: int) -> None:
    world.patience = 1e9
    world.queues["text"] = [(f"j{number}", world.workspace("text"), 0) for number in range(jobs)]
    for _ in range(2000):
        world.tick()
    assert len(world.done) == jobs
    # A loan serves all that wait, but not those that come after it; once all is done the denoiser may get the rest.
    assert 3 <= world.swaps <= 4 + world.lent


@examples(100)
@given(world=worlds(), every=st.integers(1, 3))
def test_nothing_starves_beside_a_stream_of_work(world: World, every: int) -> None:
    """Denoising could go on for ever; the first pictures come out all the same."""
    world.patience = 20.0
    for number in range(400):
        if number % every == 0:
            world.queues.setdefault("denoise", []).append((f"d{number}", world.workspace("denoise"), world.now))
        if number % 50 == 0:
            world.queues.setdefault("text", []).append((f"t{number}", world.workspace("text"), world.now))
        world.tick()
    assert "t0" in world.done or any(job == "t0" for job, *_ in world.queues.get("vae", []))
    assert world.done


def model_at(stage: Stage, model: str, lease: int, held: float = 0.0) -> LeasedWorker:
    """A worker of 10 bytes of weights and 1 of workspace on GPU 0."""
    need = replace(Need(10, 10, 1), lends=TRAITS[stage].lends, momentary=TRAITS[stage].momentary)
    demand = GpuDemand(need, lease, max(0, lease - 1))
    return LeasedWorker(f"{stage}/{model}", stage, model_key(model), {0: demand}, held=held)


def moment(holders: list[LeasedWorker], waiting: list[tuple[Stage, str, float]], depth: dict[Line, int]) -> Snapshot:
    """What there is on a GPU of 11 bytes; a task of each waits so many seconds."""
    tasks: dict[tuple[Stage, ModelKey], list[WaitingTask]] = {}
    for number, (stage, model, waited) in enumerate(waiting):
        task = WaitingTask(f"j{number}", stage, model_key(model), TRAITS[stage].distance, 1, waited)
        tasks.setdefault((stage, model_key(model)), []).append(task)
    idle = [IdleWorker(holder.id, holder.stage, holder.model) for holder in holders]
    free = 11 - sum(holder.lease for holder in holders)
    return Snapshot(tasks, idle, depth, {h.id: h for h in holders}, {0: GpuSpace(11, free)}, patience=20.0)


def test_a_models_prompts_are_not_held_up_by_another_models_jobs() -> None:
    many: dict[Line, int] = {("denoise", model_key("a"), 2): 10_000, ("text", model_key("b"), 3): 1}
    snapshot = moment([model_at("text", "b", 11)], [("text", "b", 0.0)], many)
    assert decide(snapshot) == [Assign("j0", "text", "text/b")]
    own: dict[Line, int] = {("denoise", model_key("b"), 2): 10_000, ("text", model_key("b"), 3): 1}
    assert decide(replace(snapshot, depth=own)) == []


def test_of_two_models_with_nothing_in_the_one_whose_job_has_waited_longer_comes_in() -> None:
    holders = [model_at("denoise", "a", 0), model_at("denoise", "b", 0)]
    for waited, first in (((1.0, 2.0), "b"), ((2.0, 1.0), "a")):
        (lend,) = decide(moment(holders, [("denoise", "a", waited[0]), ("denoise", "b", waited[1])], {}))
        assert lend.worker == f"denoise/{first}"


def test_of_two_overdue_models_the_one_that_was_out_longer_comes_in_whosever_job_is_older() -> None:
    waiting: list[tuple[Stage, str, float]] = [("denoise", "a", 90.0), ("denoise", "b", 30.0)]
    holders = [model_at("denoise", "a", 0, held=1.0), model_at("denoise", "b", 0, held=60.0)]
    (lend,) = decide(moment(holders, waiting, {}))
    assert lend.worker == "denoise/b"


def test_many_of_another_model_make_no_loan_larger() -> None:
    """A loan for one decode is as large as that needs, whatever waits for another model's VAE."""
    lender = replace(model_at("denoise", "a", 30), lendable=25)
    vae = replace(model_at("vae", "a", 0), demands={0: GpuDemand(Need(20, 5, 1, momentary=True))})
    for model, size in (("b", 6), ("a", 21)):
        depth: dict[Line, int] = {("vae", model_key(model), 1): 9}
        snapshot = moment([lender, vae], [("vae", "a", 0.0)], depth)
        snapshot = replace(snapshot, gpus={0: GpuSpace(30, 0)})
        (loan,) = decide(snapshot)
        assert loan == TakeLoan("denoise/a", size)


@pytest.mark.parametrize(
    ("busy", "back_for", "waited", "lends"),
    [(True, 5.0, 0.0, False), (True, 5.0, 21.0, False), (True, 21.0, 0.0, True), (False, 5.0, 0.0, True)],
)
def test_a_lender_that_was_called_back_from_another_model_goes_on_with_its_task(
    busy: bool, back_for: float, waited: float, lends: bool
) -> None:
    lender = replace(model_at("denoise", "a", 30), lendable=25, busy=busy, back_for=back_for)
    vae = replace(model_at("vae", "b", 0), demands={0: GpuDemand(Need(20, 5, 1, momentary=True))})
    snapshot = moment([lender, vae], [("vae", "b", waited)], {})
    snapshot = replace(snapshot, gpus={0: GpuSpace(30, 0)}, idle=[IdleWorker(vae.id, "vae", vae.model)])
    assert [type(action) for action in decide(snapshot)] == [TakeLoan] * lends


@st.composite
def models_on_one_gpu(draw: st.DrawFn, sharing: bool = True) -> World:
    """Two or three models, each of whose workers can do its tasks with the GPU to itself; some share stages."""
    wanted: dict[str, Need] = {}
    common = draw(st.sampled_from([set(), {"text"}, {"text", "vae"}])) if sharing else set()
    for model in "abc"[: draw(st.integers(2, 3))]:
        for stage in STAGES:
            traits = TRAITS[stage]
            own = replace(draw(needs()), lends=traits.lends, momentary=traits.momentary)
            wanted[f"{stage}/{model}"] = wanted.get(f"{stage}/a", own) if stage in common else own
    least = max(need.small for need in wanted.values())
    available = draw(st.integers(least, least + sum(need.whole for need in wanted.values())))
    patience = draw(st.sampled_from([3.0, 30.0]))
    return World({0: available}, wanted, dict.fromkeys(wanted, (0,)), patience=patience, common=common)


@examples(200)
@given(world=models_on_one_gpu(), jobs=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), max_size=16))
def test_jobs_of_several_models_all_get_done(world: World, jobs: list[tuple[int, int]]) -> None:
    models = sorted({worker.partition("/")[2] for worker in world.needs})
    for number, (at, which) in enumerate(sorted(jobs)):
        while world.now < at:
            world.tick()
        model = world.of[f"j{number}"] = models[which % len(models)]
        world.queues.setdefault("text", []).append((f"j{number}", world.workspace("text", model), world.now))
    for _ in range(3000):
        if len(world.done) == len(jobs):
            break
        world.tick()
    assert sorted(world.done) == sorted(f"j{number}" for number in range(len(jobs)))


@examples(100)
@given(world=models_on_one_gpu(sharing=False), jobs=st.integers(1, 8))
def test_a_model_is_drained_before_another_comes_in(world: World, jobs: int) -> None:
    """Jobs of several models in turns have each denoiser come in once, as the same jobs sorted by model.

    Where they share a text encoder their prompts come to it by age, whatever their models are.
    """
    world.patience = 1e9
    models = sorted({worker.partition("/")[2] for worker in world.needs})
    for number in range(jobs * len(models)):
        model = world.of[f"j{number}"] = models[number % len(models)]
        world.queues.setdefault("text", []).append((f"j{number}", world.workspace("text", model), 0))
    for _ in range(4000):
        if len(world.done) == jobs * len(models):
            break
        world.tick()
    assert len(world.done) == jobs * len(models)
    assert all(world.came_in[f"denoise/{model}"] == 1 for model in models)


@examples(100)
@given(world=models_on_one_gpu(), every=st.integers(1, 3), start=st.integers(0, 100))
def test_no_model_starves_beside_another_that_always_has_jobs(world: World, every: int, start: int) -> None:
    world.patience = 20.0
    for number in range(600):
        if number % every == 0:
            world.of[f"d{number}"] = "a"
            world.queues.setdefault("denoise", []).append((f"d{number}", world.workspace("denoise", "a"), world.now))
        if number == start:
            world.of["one"] = "b"
            world.queues.setdefault("text", []).append(("one", world.workspace("text", "b"), world.now))
        world.tick()
    assert "one" in world.done
    assert any(job != "one" for job in world.done)


@pytest.mark.parametrize("room", [100, 30, 12])
@pytest.mark.parametrize("lasting", [False, True])
def test_what_models_share_comes_in_once(room: int, lasting: bool) -> None:
    """A text encoder of one of them, whatever room there is: tasks of all go to that."""
    needs = {f"{stage}/{model}": Need(5, 5, 1) for stage in STAGES for model in ("a", "b")}
    world = World({0: room}, needs, dict.fromkeys(needs, (0,)), common={"text", "vae"}, lasting=lasting)
    for number in range(40):
        world.of[f"j{number}"] = "ab"[number % 2]
        world.queues.setdefault("text", []).append((f"j{number}", 1, 0))
    for _ in range(300):
        world.tick()
        for stage in world.common:
            booked = world.booked()
            assert sum(any(booked[worker]) for worker in (f"{stage}/a", f"{stage}/b")) <= 1
    assert len(world.done) == 40


def test_a_models_own_decodes_come_before_its_next_denoising_however_long_that_waits() -> None:
    """Else nobody would lend, where what is to be decoded holds denoising up."""
    world = one_gpu(int(15.5 * GB), LENDING)
    world.queues["denoise"] = [(f"j{number}", LENDING["denoise"].workspace, 0) for number in range(120)]
    for _ in range(1200):
        world.tick()
        assert len(world.queues.get("vae", [])) <= 5
    assert len(world.done) == 120


def test_a_model_does_not_starve_by_what_it_lends_to_another_that_always_has_jobs() -> None:
    moment, long = Need(1, 1, 0, momentary=True), Need(1, 1, 0, lends=True)
    needs = {f"{stage}/{model}": moment for stage in ("text", "vae") for model in ("a", "b")}
    needs |= {"denoise/a": long, "denoise/b": replace(long, workspace=151)}
    world = World({0: 153}, needs, dict.fromkeys(needs, (0,)), patience=20.0)
    world.of["one"] = "b"
    world.queues["text"] = [("one", 0, 0)]
    for number in range(200):
        world.of[f"d{number}"] = "a"
        world.queues.setdefault("denoise", []).append((f"d{number}", 0, world.now))
        world.tick()
    assert "one" in world.done
    assert len(world.done) > 100


def test_a_decode_of_another_model_is_lent_for_beside_a_denoiser_whose_jobs_always_wait() -> None:
    """Those had always waited for longer than it, so that the lender always went first."""
    moment, long = Need(1, 1, 0, momentary=True), Need(1, 1, 0, lends=True)
    needs = {f"{stage}/{model}": moment for stage in ("text", "vae") for model in ("a", "b")}
    needs |= {"vae/b": replace(moment, workspace=1), "denoise/a": replace(long, workspace=2), "denoise/b": long}
    world = World({0: 3}, needs, dict.fromkeys(needs, (0,)), patience=20.0)
    for number in range(300):
        world.of[f"d{number}"] = "a"
        world.queues.setdefault("denoise", []).append((f"d{number}", 2, world.now))
        if number == 73:
            world.of["one"] = "b"
            world.queues["text"] = [("one", 0, world.now)]
        world.tick()
    assert "one" in world.done
    assert len(world.done) > 30


def test_a_task_that_lends_comes_nearer_to_its_end_beside_prompts_that_always_wait() -> None:
    """A loan that has lasted too long comes back for as long, whatever waits for too long by then."""
    lender = replace(model_at("denoise", "a", 30), lendable=25, busy=True)
    text = replace(model_at("text", "b", 0), demands={0: GpuDemand(Need(20, 5, 1, momentary=True))})
    for back_for, lends in ((5.0, False), (21.0, True)):
        snapshot = moment([replace(lender, back_for=back_for), text], [("text", "b", 90.0)], {})
        snapshot = replace(snapshot, gpus={0: GpuSpace(30, 0)}, idle=[IdleWorker(text.id, "text", text.model)])
        assert [type(action) for action in decide(snapshot)] == [TakeLoan] * lends


def test_two_denoisers_take_turns_unless_both_fit_whole() -> None:
    both = {f"{stage}/a": need for stage, need in LENDING.items()}
    both["denoise/b"] = replace(LENDING["denoise"], weights=5 * GB)
    found = lease_sizes(int(14.5 * GB), both)
    assert (found["denoise/a"].shared, found["denoise/b"].shared) == (0, 0)
    assert found["denoise/a"].exclusive == int(14.5 * GB)
    assert found["denoise/b"].exclusive == both["denoise/b"].whole
    assert found["vae/a"].borrows
    large = lease_sizes(32 * GB, both)
    assert {name: size.shared for name, size in large.items() if name.startswith("denoise")} == {
        name: both[name].whole for name in ("denoise/a", "denoise/b")
    }
    assert (large["text/a"].borrows, large["vae/a"].borrows) == (True, True)


def test_a_cached_prompt_swaps_nothing_and_text_streams_beside() -> None:
    world = one_gpu(int(14.5 * GB), FLUX)
    world.queues["denoise"] = [("a", FLUX["denoise"].workspace, 0), ("b", FLUX["denoise"].workspace, 0)]
    for _ in range(12):
        world.tick()
    assert world.done == ["a", "b"]
    assert world.held["text"] == (NOTHING,)
    assert world.swaps == 2  # the denoiser and the VAE
    world.queues["text"] = [("c", FLUX["text"].workspace, world.now)]
    for _ in range(12):
        world.tick()
    assert world.done == ["a", "b", "c"]
    assert world.held["text"][0].bytes == FLUX["text"].small
    assert world.swaps == 3


def test_pictures_are_decoded_in_what_the_denoiser_lends() -> None:
    world = one_gpu(int(14.5 * GB), LENDING)
    world.held["text"] = held(LENDING["text"].small, LENDING["text"].least)
    world.queues["denoise"] = [(name, LENDING["denoise"].workspace, 0) for name in "abc"]
    for _ in range(40):
        world.tick()
    assert world.done == ["a", "b", "c"]
    assert 1 <= world.lent <= 3
    assert world.swaps == 1 + world.lent  # the denoiser's, and the VAE's in each loan
    whole = lease_sizes(int(14.5 * GB), {**LENDING})["denoise"].exclusive
    assert (world.held["denoise"][0].bytes, world.loans) == (whole, {})
    assert world.held["vae"] == (NOTHING,)


def test_a_loan_that_is_too_small_goes_back_for_a_larger_one() -> None:
    world = one_gpu(int(14.5 * GB), LENDING)
    world.held["denoise"] = held(int(13 * GB), int(12.4 * GB))
    world.queues["vae"] = [("small", GB, 0), ("large", 2 * GB, 0)]
    world.busy["denoise", 0] = ("x", GB)
    for _ in range(20):
        world.tick()
    assert world.done == ["small", "large", "x"] or world.done == ["x", "small", "large"]
    assert (world.lent, world.loans) == (2, {})


def test_what_is_lent_is_not_for_those_who_take_turns() -> None:
    """A text encoder that can't borrow took what the VAE had given back, and the denoiser waited for ever."""
    needs = {"text": Need(1, 1, 0), "denoise": Need(2, 1, 6, lends=True), "vae": Need(1, 1, 0, momentary=True)}
    world = one_gpu(7, {stage: needs[stage] for stage in STAGES})
    world.held["denoise"] = held(7, 1)
    world.loans["denoise"] = Loan(1, given=True)
    world.queues["text"] = [("a", 0, 0)]
    assert decide(world.snapshot()) == [ReturnLoan("denoise")]
    for _ in range(60):
        world.tick()
    assert (world.done, world.loans) == (["a"], {})


def test_what_is_lent_goes_back_where_nobody_needs_it_any_more() -> None:
    world = one_gpu(int(14.5 * GB), LENDING)
    world.held["denoise"] = held(int(14 * GB), int(13 * GB))
    world.queues["vae"] = [("a", 2 * GB, 0)]
    world.busy["denoise", 0] = ("x", GB)
    (loan,) = decide(world.snapshot())
    assert loan == TakeLoan("denoise", LENDING["vae"].least + 2 * GB - GB // 2)
    world.loans["denoise"] = Loan(loan.bytes, given=True)
    world.queues["vae"] = []  # it was cancelled
    assert decide(world.snapshot()) == [ReturnLoan("denoise")]


def test_who_streams_more_than_needed_gets_more_room_if_several_tasks_wait_and_nobody_else_wants_it() -> None:
    world = one_gpu(int(14.5 * GB), FLUX)
    world.held["denoise"] = held(6 * GB, 6 * GB - FLUX["denoise"].workspace)
    task = ("a", FLUX["denoise"].workspace, 0)
    assert [type(action) for action in decide_with(world, [task])] == [Assign]
    (lend,) = decide_with(world, [task, ("b", FLUX["denoise"].workspace, 0)])
    assert isinstance(lend, ChangeLease)
    assert lend.bytes == lease_sizes(world.available[0], {**FLUX})["denoise"].exclusive
    actions = decide_with(world, [task, ("b", FLUX["denoise"].workspace, 0)], text=1)
    assert {action.worker for action in actions} == {"denoise", "text"}  # room for others comes first
    assert any(isinstance(action, Assign) for action in actions)
    world.held["denoise"] = held(lend.bytes - GB, lend.weight_bytes - GB)
    assert [type(action) for action in decide_with(world, [task, task])] == [Assign]  # too little to be worth it


def test_who_needs_a_little_more_to_stream_nothing_gets_it_once_nobody_waits() -> None:
    world = one_gpu(60 * GB, FLUX)
    need = FLUX["denoise"]
    world.held["denoise"] = held(need.whole - GB // 10, need.weights - GB // 10)  # it has LoRAs beside its weights now
    task = ("a", need.workspace, 0)
    assert [type(action) for action in decide_with(world, [task])] == [Assign]
    (lend,) = decide_with(world, [])
    assert isinstance(lend, ChangeLease)
    assert (lend.worker, lend.bytes, lend.weight_bytes) == ("denoise", need.whole, need.weights)
    world.held["denoise"] = held(need.whole, need.weights)
    assert decide_with(world, []) == []


def test_a_free_gpu_is_used_before_anybody_must_go() -> None:
    workers = {"denoise-0": FLUX["denoise"], "denoise-1": FLUX["denoise"], "text": FLUX["text"], "vae": FLUX["vae"]}
    world = World({0: 40 * GB, 1: 30 * GB}, workers, {"denoise-0": (0,), "denoise-1": (1,), "text": (0,), "vae": (1,)})
    world.held["text"] = held(FLUX["text"].whole, FLUX["text"].weights)
    world.queues["denoise"] = [("a", FLUX["denoise"].workspace, 0)]
    (lend,) = decide(world.snapshot())
    assert lend.worker == "denoise-0"  # GPU 0 has 30 GB left, GPU 1 keeps 3 GB for the VAE
    world.queues["denoise"].append(("b", FLUX["denoise"].workspace, 0))
    assert {action.worker for action in decide(world.snapshot())} == {"denoise-0", "denoise-1"}


def test_a_task_too_large_for_one_gpu_waits_for_the_other_and_smaller_ones_pass_it() -> None:
    workers = {"denoise-0": Need(10 * GB, GB, GB), "denoise-1": Need(10 * GB, GB, GB)}
    world = World({0: 4 * GB, 1: 20 * GB}, workers, {"denoise-0": (0,), "denoise-1": (1,)})
    world.held = {"denoise-0": held(4 * GB, 3 * GB), "denoise-1": held(20 * GB, 10 * GB)}
    world.busy["denoise-1", 0] = ("x", GB)
    world.queues["denoise"] = [("large", 8 * GB, 0), ("small", GB, 0)]
    assert decide(world.snapshot()) == [Assign("small", "denoise", "denoise-0")]
    world.busy = {("denoise-0", 0): ("x", GB)}
    assert decide(world.snapshot()) == [Assign("large", "denoise", "denoise-1")]


def test_who_lies_on_several_gpus_comes_in_on_all_or_none_and_changes_nothing_beside_a_job() -> None:
    half = Need(10 * GB, GB, GB)
    gpus: dict[str, tuple[int, ...]] = {"denoise": (0, 1), "text": (0,), "vae": (1,)}
    world = World({0: 16 * GB, 1: 18 * GB}, {**FLUX, "denoise": half}, gpus, jobs={"denoise": 2})
    world.held["text"] = held(9 * GB, 8 * GB)
    world.queues["denoise"] = [("a", GB, 0), ("b", GB, 0), ("large", 2 * GB, 0)]
    assert decide(world.snapshot()) == [ChangeLease("text", (NOTHING,))]
    world.tick()
    world.tick()
    assert [lease.bytes for lease in world.held["denoise"]] == [0, 0]
    assert world.busy == {("denoise", 0): ChangeLease("denoise", held(12 * GB, 10 * GB) * 2)}
    world.tick()
    assert set(world.busy) == {("denoise", 0), ("denoise", 1)}
    del world.busy["denoise", 1]
    assert decide(world.snapshot()) == []  # the large one waits until both hands are free
    world.tick()
    assert world.busy["denoise", 0] == ChangeLease("denoise", held(14 * GB, 10 * GB) * 2)


def test_text_streams_beside_what_lies_on_several_gpus_and_never_pushes_it_out() -> None:
    spread = Need(10 * GB, GB, GB, spread=True)
    found = lease_sizes(int(14.5 * GB), {"denoise": spread, "text": FLUX["text"]})
    assert found["denoise"].shared == found["denoise"].exclusive == spread.whole
    assert found["text"].exclusive == int(3.5 * GB)
    assert found["text"].shared == 0  # the largest of the others works in what is left
    short = lease_sizes(int(11.2 * GB), {"denoise": spread, "text": FLUX["text"]})
    assert short["denoise"].shared == int(11.2 * GB) - FLUX["text"].small
    assert short["text"].exclusive == FLUX["text"].small
    alone = lease_sizes(int(2.5 * GB), {"denoise": spread, "text": FLUX["text"]})
    assert alone["text"].exclusive == int(2.5 * GB)


def held(size: int, weights: int) -> tuple[Lease, ...]:
    return (Lease(bytes=size, weight_bytes=weights),)


def decide_with(world: World, denoise: list[tuple[str, int, int]], text: int = 0) -> list[Action]:
    world.queues = {
        "denoise": denoise,
        "text": [(f"t{number}", FLUX["text"].workspace, 0) for number in range(text)],
    }
    return decide(world.snapshot())


def recipe(width: int = 1024, num_images: int = 1) -> Recipe:
    return Recipe(
        prompt="a", negative_prompt=None, width=width, height=1024, steps=28, guidance=3.5, cfg_scale=None, seed=1,
        num_images=num_images, max_sequence_length=512, model="m", revision="m", dtype="bfloat16",
    )  # fmt: skip


def test_the_ledger_counts_contexts_leases_and_what_is_on_its_way() -> None:
    used = 0
    ledger = Ledger({0: Account(16 * GB, 1 * GB, lambda: used)})
    needs = WeightNeed(weights=10 * GB, least=GB, workspace=GB)
    ledger.join("a", [Holding(0, needs, context=700_000_000)])
    used = int(1.7 * GB)
    assert ledger.available(0) == 16 * GB - 700_000_000 - FIRST_HEADROOM
    ledger.lend("a", held(11 * GB, 10 * GB))
    left = ledger.available(0) - 11 * GB
    assert ledger.free(0) == left
    ledger.join("b", [Holding(0, needs, context=700_000_000)])
    with pytest.raises(AssertionError, match="pass the budget"):
        ledger.lend("b", held(left + 1, GB))
    ledger.settled("a", held(11 * GB, 10 * GB), [0])
    ledger.has_worked("a", [900_000_000])
    assert ledger.available(0) == 16 * GB - 900_000_000 - HEADROOM - 700_000_000 - FIRST_HEADROOM
    used = 15 * GB  # somebody else has come
    free, available = ledger.free(0), ledger.available(0)
    with ledger.as_measured([0]):
        assert (ledger.free(0), ledger.available(0)) == (2 * GB, available - (free - 2 * GB))
    assert (ledger.free(0), ledger.available(0)) == (free, available)
    ledger.lend("b", held(GB, GB))
    with ledger.as_measured([0]):  # which the driver may count already
        assert (ledger.free(0), ledger.available(0)) == (GB, available)
    ledger.settled("b", [NOTHING], [0])
    ledger.orphan("a", "host/1")
    assert ledger.free(0) < 5 * GB
    ledger.leave("host/1")
    available = ledger.available(0)
    ledger.settled("b", [NOTHING], kept=[50])
    assert ledger.free(0) == ledger.available(0) == available - 50  # in no lease, so nobody is asked for it
    ledger.settled("b", [NOTHING], kept=[20])  # each measurement takes the place of the last
    assert ledger.available(0) == available - 20


def test_workspace_is_learned_by_size_and_estimated_high_before() -> None:
    ledger = Ledger({0: Account(16 * GB)})
    needs = WeightNeed(weights=10 * GB, least=GB, workspace=1_600_000_000)
    assert ledger.workspace("denoise", MODEL, recipe(), needs) == 1_600_000_000
    assert ledger.workspace("denoise", MODEL, recipe(2048, 2), needs) == 4 * 1_600_000_000
    key = ledger.learn("denoise", MODEL, recipe(), 540_000_000)
    assert key is not None
    assert ledger.learn("denoise", MODEL, recipe(), 530_000_000) is None
    known = ledger.workspace("denoise", MODEL, recipe(), needs)
    assert 540_000_000 < known < 900_000_000
    assert known < ledger.workspace("denoise", MODEL, recipe(2048), needs) < 2 * 1_000_000_000
    assert ledger.workspace("denoise", ModelKey("other", "bfloat16"), recipe(), needs) == 1_600_000_000
    assert Ledger({}, {key: 540_000_000}).workspace("denoise", MODEL, recipe(), needs) == known
