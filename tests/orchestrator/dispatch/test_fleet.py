"""The fleet knows who is idle, who is silent, and which workers are one process."""

from orchestrator.dispatch.fleet import LOADING_SECONDS, PROVEN_SECONDS, SILENCE_SECONDS, VOUCHED_SECONDS, Fleet
from orchestrator.dispatch.step_deadlines import FACTOR, LEAST_SECONDS, LENT_SECONDS, StepDeadlines
from orchestrator.dispatch.subscriptions import Subscriptions
from orchestrator.principal import Host, KeyHolder
from protocol.gpu_memory import GpuId
from protocol.job import Recipe
from protocol.messages.common import TaskKey
from protocol.messages.worker import WorkerHello
from tests.fakes import MODEL
from tests.protocol.test_recipe import recipe


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def hello(name: str, pid: int = 1, host: str = "h", **fields: object) -> WorkerHello:
    return WorkerHello(
        name=name, stage="denoise", pid=pid, host=host, device="none", dtype="float32", model=MODEL, **fields
    )


def task(attempt: int = 1) -> TaskKey:
    return TaskKey(job="j", stage="denoise", attempt=attempt)


def test_a_worker_is_idle_between_ready_and_its_task() -> None:
    fleet = Fleet()
    one, two = fleet.hello(b"1", hello("a", 1)), fleet.hello(b"2", hello("b", 2))
    assert fleet.idle() == []
    fleet.ready(one)
    fleet.ready(two)
    assert [idle.id for idle in fleet.idle()] == [one.id, two.id]
    fleet.give(one, task(), None)
    assert [idle.id for idle in fleet.idle()] == [two.id]
    fleet.swap(two)
    assert fleet.idle() == []
    fleet.remove(two)
    assert list(fleet) == [one]


def test_several_workers_of_one_process_have_one_lease_and_rest_together() -> None:
    fleet = Fleet()
    first, second = fleet.hello(b"1", hello("a", part=0, parts=2)), fleet.hello(b"2", hello("a.2", part=1, parts=2))
    fleet.ready(second)
    assert fleet.idle() == []  # its process is still loading
    fleet.ready(first)
    assert {idle.holder for idle in fleet.idle()} == {first.id}
    assert fleet.first(second) is first
    assert fleet.resting_since(first) is not None
    fleet.give(second, task(), None)
    assert fleet.resting_since(first) is None


def test_gpus_of_two_hosts_with_the_same_number_are_two() -> None:
    fleet = Fleet()
    here, there = fleet.hello(b"1", hello("a", gpus=(0,))), fleet.hello(b"2", hello("b", host="other", gpus=(0,)))
    assert here.gpus == (GpuId("h", 0),)
    assert there.gpus == (GpuId("other", 0),)


def test_silence_is_long_for_one_that_loads() -> None:
    fleet = Fleet(clock := Clock())
    loading, idle = fleet.hello(b"1", hello("a", 1)), fleet.hello(b"2", hello("b", 2))
    fleet.ready(idle)
    clock.now += SILENCE_SECONDS + 0.1
    assert fleet.silent() == [idle]
    assert fleet.get(b"2") is idle  # it is heard of again
    assert fleet.silent() == []
    clock.now += LOADING_SECONDS
    assert fleet.silent() == [loading, idle]


def test_a_worker_whose_host_is_back_after_a_cut_has_time_to_come_back_too() -> None:
    fleet = Fleet(clock := Clock())
    worker = fleet.hello(b"1", hello("a", host="box"), Host("box"))
    poser = fleet.hello(b"2", hello("b", host="box"), KeyHolder("eve"))
    fleet.ready(worker)
    fleet.ready(poser)
    clock.now += VOUCHED_SECONDS + 1
    assert fleet.silent() == [worker, poser]
    back = clock.now
    assert fleet.silent({"box": back}) == [poser]
    clock.now += VOUCHED_SECONDS - 2
    assert fleet.silent({"box": back}) == [poser]
    clock.now += 2
    assert fleet.silent({"box": clock.now}) == [worker, poser]  # an agent that comes again and again vouches once


def test_a_worker_is_proven_by_a_task_or_by_time() -> None:
    fleet = Fleet()
    worker = fleet.hello(b"1", hello("a"))
    fleet.ready(worker)
    assert not worker.proven
    worker.done = 1
    assert worker.proven
    worker.done = 0
    worker.joined -= PROVEN_SECONDS + 0.1
    assert worker.proven


def test_a_step_is_overdue_by_what_steps_of_its_kind_took() -> None:
    fleet, deadlines = Fleet(clock := Clock()), StepDeadlines(600.0, clock)
    kind: Recipe = recipe(seed=1)
    worker = fleet.hello(b"1", hello("a", gpus=(0,)))
    fleet.give(worker, task(), StepDeadlines.key("denoise", kind))
    clock.now += 5.0
    deadlines.moved(worker, kind, 1)
    clock.now += FACTOR * 5.0 + 1
    assert deadlines.overdue(fleet) == []  # its first task: nothing is known of the process
    worker.done = 1
    assert [(late.id, seconds) for late, seconds in deadlines.overdue(fleet)] == [(worker.id, FACTOR * 5.0 + 1)]
    deadlines.moved(worker, kind, 2)
    assert deadlines.overdue(fleet) == []
    assert FACTOR * 0.001 < LEAST_SECONDS


def test_each_client_that_watches_is_probed_in_a_few_rounds_with_a_job_of_its_own() -> None:
    subscriptions = Subscriptions()
    for number in range(7):
        subscriptions.add(b"%d" % number, f"job{number}", known_as=f"mine{number}")
    found = [subscriptions.probe(3) for _ in range(3)]
    assert sorted(pair for part in found for pair in part) == [(b"%d" % n, f"job{n}") for n in range(7)]
    assert max(map(len, found)) <= 3
    subscriptions.forget_client(b"3")
    assert b"3" not in {client for _ in range(3) for client, _ in subscriptions.probe(3)}
    assert subscriptions.of("job2") == {b"2": "mine2"}


def test_subscriptions_forget_a_job_and_a_client() -> None:
    subscriptions = Subscriptions()
    for client, job in ((b"1", "a"), (b"1", "b"), (b"2", "a")):
        subscriptions.add(client, job)
    subscriptions.forget_client(b"1")
    assert (subscriptions.of("a"), subscriptions.of("b")) == ({b"2": "a"}, {})
    subscriptions.forget_job("a")
    assert not subscriptions.of("a")
    assert not subscriptions._jobs
    assert not subscriptions._clients.get("a")


def test_a_lender_is_overdue_only_where_nobody_has_what_it_lent() -> None:
    fleet, deadlines = Fleet(clock := Clock()), StepDeadlines(600.0, clock)
    lender, borrower = fleet.hello(b"1", hello("a", 1, gpus=(0,))), fleet.hello(b"2", hello("b", 2, gpus=(0,)))
    fleet.ready(lender)
    fleet.ready(borrower)
    fleet.give(fleet.hello(b"3", hello("c", 3, gpus=(1,))), task(), None)  # which has nothing to do with it
    fleet.borrow(lender)
    assert [idle.id for idle in fleet.idle()] == [borrower.id]
    fleet.lent(lender, 100)
    fleet.give(borrower, task(), None)
    for _ in range(3):
        clock.now += LENT_SECONDS
        assert deadlines.overdue(fleet) == []
    fleet.ready(borrower)
    clock.now += LENT_SECONDS + 1
    assert [late.id for late, _ in deadlines.overdue(fleet)] == [lender.id]
    fleet.return_loan(lender, 30.0)
    assert deadlines.overdue(fleet) == []
    assert {idle.id for idle in fleet.idle()} == {lender.id, borrower.id}
