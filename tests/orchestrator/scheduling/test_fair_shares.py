"""Fair shares: nobody who waits starves, and each owner gets its part of the workers' time."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.dispatch.stage_queues import StageQueues
from orchestrator.dispatch.task_seconds import UNKNOWN_SECONDS, TaskSeconds
from orchestrator.principal import KeyHolder, Principal
from orchestrator.scheduling.fair_shares import FairShares
from tests.chance import examples
from tests.orchestrator.storage.test_job_store import job as stored_job

TASKS = 1000
WITHIN = 0.05
weights = st.lists(st.sampled_from((0.5, 1.0, 2.0, 4.0)), min_size=2, max_size=5)
costs = st.lists(st.floats(0.2, 3.0), min_size=5, max_size=20)


def first_of(shares: FairShares[int], waiting: dict[int, int], cost: float) -> int:
    """The owner whose task is served next, where each has so many that are expected to take so long."""
    tasks = {owner: [(str(owner), cost)] * min(2, count) for owner, count in waiting.items() if count}
    return int(next(shares.merged(tasks)))


@examples(30)
@given(weights=weights, costs=costs, workers=st.integers(1, 4), expected=st.floats(0.1, 5.0))
def test_owners_who_always_have_jobs_get_their_parts_of_the_workers_time(
    weights: list[float], costs: list[float], workers: int, expected: float
) -> None:
    """Whatever their tasks take, and whatever was expected of them; several workers serve them."""
    shares = FairShares[int](lambda owner: weights[owner])
    waiting = dict.fromkeys(range(len(weights)), TASKS)
    for owner in waiting:
        shares.add(owner)
    used, served = [0.0] * len(weights), 0
    running: list[tuple[float, int, float]] = []  # ends at, whose, seconds
    now = 0.0
    while served < TASKS:
        while len(running) < workers:
            owner = first_of(shares, waiting, expected)
            seconds = costs[(served + owner) % len(costs)]
            shares.begin(owner, expected)
            running.append((now + seconds, owner, seconds))
            served += 1
        running.sort()
        now, owner, seconds = running.pop(0)
        shares.correct(owner, seconds - expected)
        used[owner] += seconds
    total = sum(used)
    for owner, weight in enumerate(weights):
        assert abs(used[owner] / total - weight / sum(weights)) <= WITHIN


@examples(50)
@given(
    events=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40)), min_size=1, max_size=40),
    cost=st.floats(0.1, 10.0),
)
def test_nobody_who_waits_starves(events: list[tuple[int, int]], cost: float) -> None:
    """Between two tasks of one who waits, each other one gets at most two more than come to it, whoever came when."""
    shares, waiting = FairShares[int](), defaultdict[int, int](int)
    since: dict[int, int] = {}  # tasks served to others since an owner was served last, or came
    for owner, count in events:
        for _ in range(count):
            shares.add(owner)
        waiting[owner] += count
        since.setdefault(owner, 0)
        for _ in range(3):
            if not any(waiting.values()):
                break
            chosen = first_of(shares, waiting, cost)
            shares.begin(chosen, cost)
            shares.remove(chosen)
            waiting[chosen] -= 1
            for other in [other for other, count in waiting.items() if count]:
                since[other] = since.get(other, 0) + 1
            since[chosen] = 0
            present = [other for other, count in waiting.items() if count]
            assert all(since[other] <= 3 * max(1, len(waiting)) for other in present)


def test_one_who_comes_late_neither_catches_up_nor_pays_for_what_was_idle() -> None:
    shares = FairShares[str]()
    shares.add("early")
    for _ in range(100):
        shares.begin("early", 1.0)
    shares.add("late")
    order = list(
        shares.merged({"early": [(f"e{n}", 1.0) for n in range(3)], "late": [(f"l{n}", 1.0) for n in range(3)]})
    )
    assert [job[0] for job in order] == list("lelele")
    shares.remove("late")
    for _ in range(50):
        shares.begin("early", 1.0)
    shares.add("late")
    assert next(shares.merged({"late": [("l", 1.0)], "early": [("e", 1.0)]})) == "l"


def test_what_one_has_taken_is_not_forgotten_by_leaving() -> None:
    shares = FairShares[str]()
    shares.add("steady")
    shares.add("greedy")
    shares.begin("greedy", 10.0)
    shares.remove("greedy")
    shares.add("greedy")
    order = list(shares.merged({"greedy": [("g", 1.0)], "steady": [(f"s{n}", 1.0) for n in range(9)]}))
    assert order.index("g") == 9


def test_time_in_which_ones_jobs_could_not_be_done_is_not_saved_up_nor_a_gift_to_those_who_come() -> None:
    """One owner's jobs wait for what isn't there (a drained stage, say) while another works for hours."""
    shares = FairShares[str]()
    shares.add("parked")
    shares.add("busy")
    for _ in range(10_000):
        shares.begin("busy", 1.0)
    shares.add("late")
    tasks = {name: [(f"{name} {n}", 1.0) for n in range(200)] for name in ("busy", "late", "parked")}
    order = [job.split()[0] for job in shares.merged(tasks)]
    assert order[:63].count("parked") >= 60  # what it may be behind
    assert abs(order[63:123].count("busy") - order[63:123].count("late")) <= 2


def test_a_job_that_is_cancelled_at_work_costs_what_its_worker_was_kept_with() -> None:
    now = 0.0
    shares = FairShares[Principal]()
    seconds = TaskSeconds(shares, lambda: now)
    greedy, steady = (
        stored_job(1)._replace(owner=KeyHolder("greedy")),
        stored_job(2)._replace(owner=KeyHolder("steady")),
    )
    for job in (greedy, steady):
        shares.add(job.owner)
    seconds.begin("w", greedy)
    shares.remove(greedy.owner)  # it is cancelled at once, and its worker comes to the end of its step later
    shares.add(greedy.owner)
    now = 8.0
    seconds.end("w")
    order = list(shares.merged({greedy.owner: [("g", 1.0)], steady.owner: [(f"s{n}", 1.0) for n in range(9)]}))
    assert order.index("g") >= 7
    assert seconds.expected(greedy) == UNKNOWN_SECONDS  # nothing was learned of it


def test_weights_decide_how_many_of_each_are_served() -> None:
    heavy, light = KeyHolder("heavy"), KeyHolder("light")
    queues = StageQueues(FairShares(lambda owner: 3.0 if owner == heavy else 1.0))
    for number in range(40):
        queues.add(stored_job(number)._replace(owner=light if number % 2 else heavy))
    first = queues.first("text", stored_job(1).model, 20)
    assert sum(int(job.removeprefix("job")) % 2 == 0 for job in first) == 15
