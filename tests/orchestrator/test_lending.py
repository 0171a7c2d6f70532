"""Leases as workers see them: what is lent, taken back, learned and refused, over real sockets."""

from pathlib import Path

import pytest

from orchestrator.ledger import FIRST_HEADROOM, HEADROOM
from protocol.errors import DoesNotFit, JobFailed
from protocol.jobs import JobRequest, Needs
from protocol.messages import Committed, Lease, Leased, Processes, Result, SupervisorHello, Task, TaskFailed
from tests.fakes import OUTPUTS, FakeWorker, Orchestrator, orchestrator

GB = 10**9
TEXT = Needs(weights=10 * GB, least=GB, workspace=GB // 2)
DENOISE = Needs(weights=20 * GB, least=2 * GB, workspace=2 * GB)
CONTEXT = GB // 2


def one_gpu(budget: int) -> dict[str, object]:
    return {"gpus": {0: {"budget": budget, "driver": False}}}


def leased(running: Orchestrator, stage: str, needs: Needs) -> FakeWorker:
    worker = running.worker(stage, gpu=0, pid=1_000_000 + len(stage))  # type: ignore[arg-type]
    return worker.ready(needs, context_bytes=CONTEXT)


def finish(worker: FakeWorker, workspace: int = 0) -> Task:
    task = worker.take()
    result = Result(job=task.job, stage=task.stage, attempt=task.attempt, seconds=0.1, workspace_bytes=workspace)
    worker.say(result, OUTPUTS[task.stage])
    worker.hear(Committed)
    worker.ready(context_bytes=CONTEXT)
    return task


def test_stages_that_do_not_fit_together_take_turns(state: Path) -> None:
    budget = 13 * GB
    with orchestrator(state, **one_gpu(budget)) as running:
        text, denoise = leased(running, "text", TEXT), leased(running, "denoise", DENOISE)
        client = running.client()
        client.submit_many([JobRequest(prompt=f"a cat {i}", seed=i, width=1024, height=1024) for i in range(2)])
        first = text.obey()
        assert first.bytes == TEXT.weights + TEXT.workspace
        finish(text)
        finish(text)
        assert text.obey().bytes == 0
        second = denoise.obey()
        assert second.bytes + 2 * CONTEXT + HEADROOM + FIRST_HEADROOM <= budget
        assert second.bytes - second.weights == DENOISE.workspace
        views = {view.stage: view for view in client.workers().workers}
        assert views["denoise"].lease_bytes == second.bytes
        assert (views["text"].lease_bytes, views["text"].gpu) == (0, 0)
        finish(denoise)
        client.submit("a cat 0", seed=7, width=1024, height=1024)  # a prompt that is known swaps nothing
        finish(denoise)
        finish(denoise)
        assert not [e for e in denoise.seen if isinstance(e.message, Lease) and e.message.bytes == 0]


def test_a_denoiser_that_runs_out_of_memory_gets_more_room_and_its_try_does_not_count(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB)) as running:
        running.worker("text").ready()
        denoise = leased(running, "denoise", DENOISE)
        client = running.client()
        job = client.submit("a cat", seed=1, width=1024, height=1024)
        text = running._opened[0]
        assert isinstance(text, FakeWorker)
        text.finish(text.take())
        lease = denoise.obey()
        spaces = [lease.bytes - lease.weights]
        for _ in range(4):  # more often than a job may fail
            task = denoise.take()
            key = {"job": task.job, "stage": task.stage, "attempt": task.attempt}
            denoise.say(TaskFailed(**key, reason="out of memory", retry=True, out_of_memory=True))
            denoise.ready(context_bytes=CONTEXT)
            if spaces[-1] * 1.7 > 13 * GB - CONTEXT - HEADROOM - DENOISE.least:
                break
            lease = denoise.obey()
            spaces.append(lease.bytes - lease.weights)
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
        text.say(Result(job=task.job, stage="text", attempt=task.attempt, seconds=0.1), OUTPUTS["text"])
        text.hear(Committed)
        from protocol.messages import WorkerGoodbye

        text.say(WorkerGoodbye())
        denoise.settle()
        assert not [e for e in denoise.seen if isinstance(e.message, Lease)]
        supervisor = running.worker("vae")  # any peer may say hello as the supervisor
        supervisor.say(SupervisorHello(pid=1))
        supervisor.say(Processes(processes=(), exited_pids=(1_000_004,)))
        lease = denoise.obey()
        assert lease.bytes > 10 * GB
        assert denoise.take().job == job.id


def test_a_lease_that_fails_counts_as_a_failure_of_what_waited_for_it(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB)) as running:
        text = leased(running, "text", TEXT)
        client = running.client()
        job = client.submit("a cat", seed=1)
        for _ in range(3):
            assert text.hear(Lease).bytes
            text.say(Leased(bytes=0, weights=0, reason="no memory after all"))
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
        again = running.worker("text", gpu=0)
        again.ready(TEXT, context_bytes=CONTEXT, lease_bytes=lease.bytes, lease_weights=lease.weights)
        leased(running, "denoise", DENOISE)
        assert again.obey().bytes == 0


def test_an_idle_stage_gives_back_its_memory_after_keep_alive(state: Path) -> None:
    with orchestrator(state, **one_gpu(13 * GB), keep_alive={"text": 0}) as running:
        text = leased(running, "text", TEXT)
        running.client().submit_many([JobRequest(prompt=f"a cat {i}", seed=i) for i in range(2)])
        assert text.obey().bytes
        finish(text)
        finish(text)
        assert text.obey().bytes == 0
