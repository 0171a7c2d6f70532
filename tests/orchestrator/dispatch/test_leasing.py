"""Leases as workers see them: what is lent, taken back, learned and refused, over real sockets."""

from pathlib import Path

import pytest

from orchestrator.memory.margins import FIRST_HEADROOM, HEADROOM
from orchestrator.scheduling.snapshot import NOTHING
from protocol.errors import DoesNotFit, JobFailed
from protocol.gpu_memory import Lease, WeightNeed
from protocol.job import JobRequest
from protocol.messages.supervisor import Processes, SupervisorHello
from protocol.messages.worker import (
    Borrow,
    Committed,
    Leased,
    Lent,
    Result,
    Returned,
    SetLease,
    Task,
    TaskFailed,
    WorkerGoodbye,
)
from protocol.stages import USUAL_NEXT
from scripts.faults.saboteur import patiently
from tests.fakes import OUTPUTS, FakeWorker, Orchestrator, orchestrator

GB = 10**9
TEXT = WeightNeed(weights=10 * GB, least=GB, workspace=GB // 2)
DENOISE = WeightNeed(weights=20 * GB, least=2 * GB, workspace=2 * GB)
VAE = WeightNeed(weights=GB // 5, least=GB // 5, workspace=3 * GB)
CONTEXT = GB // 2


def one_gpu(budget: int) -> dict[str, object]:
    return {"gpus": {0: {"budget": budget, "driver": False}}}


def leased(running: Orchestrator, stage: str, needs: WeightNeed) -> FakeWorker:
    worker = running.worker(stage, gpus=(0,), pid=1_000_000 + len(stage))
    return worker.ready(needs, context_bytes=(CONTEXT,))


def finish(worker: FakeWorker, task: Task | None = None) -> Task:
    task = task or worker.take()
    result = Result(job=task.job, stage=task.stage, attempt=task.attempt, seconds=0.1, next=USUAL_NEXT[task.stage])
    worker.say(result, OUTPUTS[task.stage])
    worker.hear(Committed)
    worker.ready(context_bytes=(CONTEXT,))
    return task


def test_stages_that_do_not_fit_together_take_turns(state: Path) -> None:
    budget = 13 * GB
    with orchestrator(state, **one_gpu(budget)) as running:
        text, denoise = leased(running, "text", TEXT), leased(running, "denoise", DENOISE)
        client = running.client()
        client.submit_many([JobRequest(prompt=f"a cat {i}", seed=i, width=1024, height=1024) for i in range(2)])
        first = text.obey()
        assert first.leases[0].bytes == TEXT.weights + TEXT.workspace
        finish(text)
        finish(text)
        assert text.obey().leases[0].bytes == 0
        second = denoise.obey()
        assert second.leases[0].bytes + 2 * CONTEXT + HEADROOM + FIRST_HEADROOM <= budget
        assert second.leases[0].bytes - second.leases[0].weight_bytes == DENOISE.workspace
        task = denoise.take()
        views = {view.stage: view for view in client.workers().workers}
        assert views["denoise"].lease_bytes == (second.leases[0].bytes,)
        assert (views["text"].lease_bytes, views["text"].gpus) == ((0,), (0,))
        finish(denoise, task)
        client.submit("a cat 0", seed=7, width=1024, height=1024)  # a prompt that is known swaps nothing
        finish(denoise)
        finish(denoise)
        assert not [e for e in denoise.seen if isinstance(e.message, SetLease) and e.message.leases[0].bytes == 0]


def in_a_loan(running: Orchestrator) -> tuple[FakeWorker, Task, Lease, int, FakeWorker]:
    """Return a denoiser in the middle of a job, its task, its lease and what it has lent; and the VAE that has it."""
    text = running.worker("text").ready()
    denoise = leased(running, "denoise", DENOISE)
    running.client().submit_many([JobRequest(prompt=f"a cat {i}", seed=i, width=1024, height=1024) for i in range(2)])
    for _ in range(2):
        text.finish(text.take())
        text.ready()
    order = denoise.hear(SetLease)
    (lease,) = order.leases
    denoise.say(Leased(leases=order.leases, lendable_bytes=lease.weight_bytes - DENOISE.least))
    finish(denoise)
    task = denoise.take()
    vae = leased(running, "vae", VAE)
    loan = denoise.hear(Borrow)
    vae.settle()
    assert not [e for e in vae.seen if isinstance(e.message, SetLease)]  # nothing, before it is free
    denoise.say(Lent(bytes=loan.bytes))
    taken = vae.obey()
    assert taken.leases[0].bytes >= VAE.least + VAE.workspace
    views = {view.stage: view for view in running.client().workers().workers}
    assert views["denoise"].lease_bytes == (lease.bytes - loan.bytes,)
    assert views["denoise"].lends
    return denoise, task, lease, loan.bytes, vae


def tell_gone(running: Orchestrator, pid: int) -> None:
    """Say as the supervisor that a process has ended; any peer may say hello as it."""
    supervisor = running.worker("text")
    supervisor.say(SupervisorHello(pid=1))
    supervisor.say(Processes(processes=(), exited_pids=(pid,)))


def test_a_vae_borrows_from_a_denoiser_in_the_middle_of_a_job(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB)) as running:
        denoise, task, lease, _, vae = in_a_loan(running)
        finish(vae)
        assert vae.obey().leases[0].bytes == 0
        missing = lease.bytes - denoise.hear(Returned).bytes
        assert 0 < missing <= CONTEXT + FIRST_HEADROOM  # of the VAE's process, which came later
        denoise.finish(task)
        denoise.ready(context_bytes=(CONTEXT,))
        assert denoise.hear(Borrow).bytes  # maybe before it hears that its result is committed
        denoise.say(Lent(bytes=0))  # it can't
        assert denoise.obey().leases[0].bytes == 0  # so they take turns
        vae.obey()
        finish(vae)
        running.client().submit_many([JobRequest(prompt="a cat 0", seed=i, width=1024, height=1024) for i in (8, 9)])
        assert vae.obey().leases[0].bytes == 0
        order = denoise.hear(SetLease)
        denoise.say(Leased(leases=order.leases, lendable_bytes=order.leases[0].weight_bytes - DENOISE.least))
        asked = sum(isinstance(entry.message, Borrow) for entry in denoise.seen)
        finish(denoise)
        denoise.settle()  # with a lease anew it is asked again
        assert sum(isinstance(entry.message, Borrow) for entry in denoise.seen) == asked + 1


def test_what_is_lent_comes_back_when_the_borrowers_process_is_gone(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB)) as running:
        denoise, task, lease, _, vae = in_a_loan(running)
        vae.take()
        vae.say(WorkerGoodbye())
        denoise.settle()
        assert not [e for e in denoise.seen if isinstance(e.message, Returned)]
        tell_gone(running, 1_000_003)
        assert denoise.hear(Returned).bytes == lease.bytes
        finish(denoise, task)


def test_an_orchestrator_that_begins_in_the_middle_of_a_loan_returns_it(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB)) as running:
        _, task, lease, lent, _ = in_a_loan(running)
        running.restart()
        denoise = running.worker("denoise", gpus=(0,), pid=1_000_007)
        denoise.ready(
            DENOISE, context_bytes=(CONTEXT,), leases=(lease,), lent_bytes=lent,
            current_task=(task.job, task.stage, task.attempt),
        )  # fmt: skip
        assert denoise.hear(Returned).bytes == lease.bytes
        finish(denoise, task)


def test_a_denoiser_that_runs_out_of_memory_gets_more_room_and_its_try_does_not_count(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB)) as running:
        text = running.worker("text").ready()
        denoise = leased(running, "denoise", DENOISE)
        client = running.client()
        job = client.submit("a cat", seed=1, width=1024, height=1024)
        text.finish(text.take())
        spaces: list[int] = []
        for _ in range(10):  # more often than a job may fail
            lease = denoise.obey()
            spaces.append(lease.leases[0].bytes - lease.leases[0].weight_bytes)
            task = denoise.take()
            key = {"job": task.job, "stage": task.stage, "attempt": task.attempt}
            denoise.say(TaskFailed(**key, reason="out of memory", retry=True, out_of_memory=True))
            denoise.ready(context_bytes=(CONTEXT,))
            if task.allow_tiling:
                break
        assert spaces == sorted(spaces)
        assert len(spaces) > 3
        with pytest.raises(JobFailed, match="out of memory"):
            client.wait(job.id, 20)
        with pytest.raises(DoesNotFit, match="beside the denoiser's weights") as refusal:
            client.submit("a cat", seed=2, width=1024, height=1024)
        assert "fits" in refusal.value.hint
        small = client.submit("a cat", seed=2, width=256, height=256)
        assert denoise.take().job == small.id  # its lease has room for that


def test_memory_of_a_worker_that_fell_away_counts_until_its_process_is_gone(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB)) as running:
        text, denoise = leased(running, "text", TEXT), leased(running, "denoise", DENOISE)
        client = running.client()
        job = client.submit("a cat", seed=1, width=1024, height=1024)
        text.obey()
        task = text.take()
        assert task.allow_tiling is False
        text.say(Result(job=task.job, stage="text", attempt=task.attempt, seconds=0.1, next="denoise"), OUTPUTS["text"])
        text.hear(Committed)
        text.say(WorkerGoodbye())
        denoise.settle()
        assert not [e for e in denoise.seen if isinstance(e.message, SetLease)]
        tell_gone(running, 1_000_004)
        lease = denoise.obey()
        assert lease.leases[0].bytes > 10 * GB
        assert denoise.take().job == job.id


def test_a_lease_that_fails_counts_as_a_failure_of_what_waited_for_it(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB), models=[{"keep_alive": {"text": 1000}}]) as running:
        text = leased(running, "text", TEXT)
        client = running.client()
        job = client.submit("a cat", seed=1)
        for _ in range(3):
            assert text.hear(SetLease).leases[0].bytes
            text.say(Leased(leases=(NOTHING,), reason="no memory after all"))
        with pytest.raises(JobFailed, match="no memory after all"):
            client.wait(job.id, 20)


def test_a_restarted_orchestrator_learns_from_its_workers_what_they_hold(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB)) as running:
        text = leased(running, "text", TEXT)
        client = running.client()
        client.submit("a cat", seed=1, width=1024, height=1024)
        lease = text.obey()
        finish(text)
        running.kill()
        running.start()
        again = running.worker("text", gpus=(0,))
        again.ready(TEXT, context_bytes=(CONTEXT,), leases=lease.leases)
        leased(running, "denoise", DENOISE)
        assert again.obey().leases[0].bytes == 0


def test_an_idle_stage_gives_back_its_memory_after_keep_alive(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB), models=[{"keep_alive": {"text": 0}}]) as running:
        text = leased(running, "text", TEXT)
        running.client().submit_many([JobRequest(prompt=f"a cat {i}", seed=i) for i in range(2)])
        assert text.obey().leases[0].bytes
        finish(text)
        finish(text)
        assert text.obey().leases[0].bytes == 0


def test_a_vae_makes_do_only_once_no_more_can_be_had(state: Path) -> None:
    vae_needs = WeightNeed(weights=GB // 5, least=GB // 5, workspace=3 * GB)
    with orchestrator(state, **one_gpu(9 * GB)) as running:
        text, denoise = running.worker("text").ready(), running.worker("denoise").ready()
        vae = leased(running, "vae", vae_needs)
        client = running.client()
        job = client.submit("a cat", seed=1, width=1024, height=1024)
        text.finish(text.take())
        denoise.finish(denoise.take())
        spaces: list[int] = []
        for _ in range(8):
            lease = vae.obey()
            spaces.append(lease.leases[0].bytes - lease.leases[0].weight_bytes)
            task = vae.take()
            if task.allow_tiling:
                break
            key = {"job": task.job, "stage": task.stage, "attempt": task.attempt}
            vae.say(TaskFailed(**key, reason="out of memory", retry=True, out_of_memory=True))
            vae.ready(context_bytes=(CONTEXT,))
        assert spaces == sorted(spaces)
        assert spaces[-1] == 9 * GB - CONTEXT - HEADROOM - vae_needs.least
        result = Result(job=task.job, stage="vae", attempt=task.attempt, seconds=1.0, warnings=("in tiles",))
        vae.say(result, OUTPUTS["vae"])
        assert client.wait(job.id, 20).records[-1].warnings == ("in tiles",)


def two_gpus(budget: int) -> dict[str, object]:
    return {"gpus": {gpu: {"budget": budget, "driver": False} for gpu in (0, 1)}}


def test_a_process_on_several_gpus_has_one_lease_for_all_its_workers_that_changes_beside_none_of_their_jobs(
    state: Path,
) -> None:
    half = WeightNeed(weights=8 * GB, least=GB, workspace=GB)
    with orchestrator(state, **two_gpus(13 * GB)) as running:
        text = leased(running, "text", TEXT)
        split = {"gpus": (0, 1), "pid": 2_000_000, "parts": 2}
        first = running.worker("denoise", name="d", **split).ready(half, half, context_bytes=(CONTEXT, CONTEXT))
        client = running.client()
        small, large = {"width": 1024, "height": 512}, {"width": 1024, "height": 1024}
        jobs = client.submit_many([JobRequest(prompt="a cat", seed=i, **small) for i in range(2)])
        jobs += client.submit_many([JobRequest(prompt="a cat", seed=2, **large)])
        text.obey()
        finish(text)
        assert text.obey().leases == (NOTHING,)
        text.settle()
        first.settle()
        assert not [e for e in first.seen if isinstance(e.message, SetLease)]  # not all its workers are here
        second = running.worker("denoise", name="d.2", part=1, **split).ready()
        lease = first.obey()
        assert [(lease.bytes, lease.weight_bytes) for lease in lease.leases] == [(9 * GB, 8 * GB)] * 2

        def held() -> dict[str, tuple[int, ...]]:
            return {worker.name: worker.lease_bytes for worker in client.workers().workers if worker.stage == "denoise"}

        patiently(lambda: any(held()["d"]))
        assert held() == {"d": (9 * GB, 9 * GB), "d.2": ()}
        one, other = first.take(), second.take()
        assert {one.job, other.job} == {jobs[0].id, jobs[1].id}
        finish(second, other)
        heard = {worker: len(worker.seen) for worker in (first, second)}
        for worker in (first, second):
            worker.settle()
            assert len(worker.seen) == heard[worker] + 1  # the beat alone: the large one waits for both
        finish(first, one)
        wider = first.obey()
        assert all(lease.bytes - lease.weight_bytes == 2 * GB for lease in wider.leases)
        assert second.take().job == jobs[2].id


def test_what_one_of_several_gpus_holds_counts_until_the_process_is_gone_and_is_told_by_one_that_comes_back(
    state: Path,
) -> None:
    half = WeightNeed(weights=8 * GB, least=8 * GB, workspace=GB)
    with orchestrator(state, **two_gpus(13 * GB)) as running:
        first = running.worker("denoise", gpus=(0, 1), pid=2_000_000)
        first.ready(half, half, context_bytes=(CONTEXT, CONTEXT))
        lease = first.obey()  # it fits for good
        running.restart()
        again = running.worker("denoise", gpus=(0, 1), pid=2_000_000)
        again.ready(half, half, context_bytes=(CONTEXT, CONTEXT), leases=lease.leases)
        text = leased(running, "text", TEXT)
        client = running.client()
        client.submit("a cat", seed=1, width=1024, height=1024)
        assert text.obey().leases[0].bytes < 13 * GB - lease.leases[0].bytes
        again.say(Leased(leases=(NOTHING,)))  # of one GPU where there are two: not heeded
        again.say(WorkerGoodbye())
        finish(text)
        client.submit("a dog", seed=1, width=1024, height=1024)
        finish(text)  # its share is no larger than before, as long as the other process may be there
        assert not [e for e in text.seen[-3:] if isinstance(e.message, SetLease)]


def test_a_stage_too_large_for_its_budget_fails_its_jobs_and_new_ones_are_refused(state: Path) -> None:
    with orchestrator(state, **one_gpu(2 * GB)) as running:
        text = running.worker("text").ready()
        client = running.client()
        job = client.submit("a cat", seed=1)
        text.finish(text.take())
        text.hear(Committed)
        leased(running, "denoise", DENOISE)
        with pytest.raises(JobFailed, match=r"denoise takes at least 2\.0 GB"):
            client.wait(job.id, 20)
        with pytest.raises(DoesNotFit, match="denoise takes at least"):
            client.submit("a dog", seed=1)


def test_what_fits_for_good_comes_in_before_there_is_work_and_is_not_tried_again_where_that_fails(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB)) as running:
        text = leased(running, "text", TEXT)
        lease = text.hear(SetLease)
        assert lease.leases[0].bytes == TEXT.weights + TEXT.workspace
        text.say(Leased(leases=(NOTHING,), reason="no memory after all"))
        text.settle()
        text.settle()
        assert sum(isinstance(envelope.message, SetLease) for envelope in text.seen) == 1
        running.client().submit("a cat", seed=1)
        assert text.obey().leases[0].bytes
