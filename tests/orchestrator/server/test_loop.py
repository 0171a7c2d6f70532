"""The orchestrator as its peers see it: real process, real sockets, workers that compute nothing."""

import random
from pathlib import Path

import pytest
import zmq

from protocol import wire
from protocol.errors import BadRequest, Conflict, JobCancelled, JobFailed, NotFound, QueueFull, VersionMismatch
from protocol.job import JobRequest
from protocol.messages.client import GetStack
from protocol.messages.worker import CancelTask, Committed, Ready, Task, TaskFailed, WorkerGoodbye
from tests.fakes import MODEL, FakeWorker, error_of, orchestrator, raw_dealer


def complete(*workers: FakeWorker) -> list[Task]:
    """Each worker in turn takes a task and finishes it."""
    tasks = []
    for worker in workers:
        tasks.append(task := worker.take())
        worker.finish(task)
        worker.hear(Committed)
        worker.ready()
    return tasks


def test_a_job_passes_the_three_stages_and_its_tensors_with_it(state: Path) -> None:
    with orchestrator(state) as running:
        text, denoise, vae = (running.worker(stage).ready() for stage in ("text", "denoise", "vae"))
        client = running.client()
        job = client.submit("a cat", seed=1)
        assert (job.state, job.recipe.steps, job.recipe.revision) == ("queued", 4, "r1")
        complete(text, denoise, vae)
        assert [t.name for t in denoise.seen[-2].tensors] == ["prompt_embeds"]
        assert [t.name for t in vae.seen[-2].tensors] == ["decode:0"]
        done = client.wait(job.id, timeout=20)
        assert [record.stage for record in done.records] == ["text", "denoise", "vae"]
        assert client.pictures(job.id)[0].tobytes() == bytes(range(12))


def test_a_prompt_seen_before_needs_no_text_worker(state: Path) -> None:
    with orchestrator(state) as running:
        text, denoise, vae = (running.worker(stage).ready() for stage in ("text", "denoise", "vae"))
        client = running.client()
        first, twin = client.submit_many([JobRequest(prompt="a cat", seed=1), JobRequest(prompt="a cat", seed=2)])
        complete(text, denoise, vae, denoise, vae)
        later = client.submit("a cat", seed=3)
        complete(denoise, vae)
        assert [client.wait(job.id, 20).cached for job in (first, twin, later)] == [False, True, True]


def test_the_same_id_twice_is_one_job_and_another_job_under_it_is_refused(state: Path) -> None:
    with orchestrator(state) as running:
        running.worker("text")
        client = running.client()
        first = client.submit("a cat", id="mine")
        assert client.submit("a cat", id="mine") == first
        assert len(client.jobs()) == 1
        with pytest.raises(Conflict, match="taken"):
            client.submit("a dog", id="mine")


def test_many_jobs_are_accepted_whole_or_not_at_all(state: Path) -> None:
    with orchestrator(state) as running:
        running.worker("text")
        client = running.client()
        with pytest.raises(BadRequest, match="empty"):
            client.submit_many([JobRequest(prompt="good"), JobRequest(prompt="")])
        with pytest.raises(QueueFull, match="at most 50"):
            client.submit_many([JobRequest(prompt="x")] * 51)
        assert client.jobs() == []


def test_accepted_jobs_survive_a_killed_orchestrator(state: Path) -> None:
    with orchestrator(state) as running:
        text, denoise = running.worker("text").ready(), running.worker("denoise").ready()
        client = running.client()
        jobs = client.submit_many([JobRequest(prompt=f"cat {i}") for i in range(20)])
        complete(text)
        task = denoise.take()
        running.kill()
        running.start()
        assert {job.id for job in running.client().jobs()} == {job.id for job in jobs}
        again = running.worker("denoise").ready().take()
        assert again.job == task.job
        assert again.attempt > task.attempt  # so that a result of the old one would be late


def test_a_late_result_of_an_old_attempt_is_dropped(state: Path) -> None:
    with orchestrator(state) as running:
        text = running.worker("text").ready()
        client = running.client()
        job = client.submit("a cat")
        old = text.take()
        text.say(TaskFailed(job=old.job, stage="text", attempt=old.attempt, reason="hiccup", retry=True))
        text.ready()
        new = text.take()
        assert new.attempt == old.attempt + 1
        text.finish(old)
        text.hear(Committed)  # or the worker would hold on to it
        assert client.job(job.id).state == "text"
        text.finish(new)
        text.hear(Committed)
        assert client.job(job.id).state == "denoise"


def test_three_failures_end_a_job_with_the_reasons_and_retry_takes_it_up(state: Path) -> None:
    with orchestrator(state) as running:
        text, denoise = running.worker("text").ready(), running.worker("denoise").ready()
        client = running.client()
        job = client.submit("a cat")
        complete(text)
        for attempt in range(3):
            task = denoise.take()
            reason = f"cause {attempt}"
            denoise.say(TaskFailed(job=task.job, stage="denoise", attempt=task.attempt, reason=reason, retry=True))
            denoise.ready()
        with pytest.raises(JobFailed, match="cause 2"):
            client.wait(job.id, 20)
        assert [f"cause {i}" in reason for i, reason in enumerate(client.job(job.id).reasons)] == [True] * 3
        client.retry(job.id)
        assert denoise.take().stage == "denoise"  # from the last finished stage


def test_a_failure_that_would_come_again_ends_the_job_at_once(state: Path) -> None:
    with orchestrator(state) as running:
        text = running.worker("text").ready()
        client = running.client()
        job = client.submit("a cat")
        task = text.take()
        text.say(TaskFailed(job=task.job, stage="text", attempt=task.attempt, reason="NaN", retry=False))
        with pytest.raises(JobFailed, match="NaN"):
            client.wait(job.id, 20)


def test_cancel_reaches_the_queue_and_the_worker(state: Path) -> None:
    with orchestrator(state) as running:
        text = running.worker("text").ready()
        client = running.client()
        busy, waiting = client.submit("a cat"), client.submit("a dog")
        task = text.take()
        client.cancel(waiting.id, busy.id)
        assert text.hear(CancelTask).job == task.job
        for job in (busy, waiting):
            with pytest.raises(JobCancelled):
                client.wait(job.id, 20)
        text.finish(task)  # too late
        text.hear(Committed)
        assert client.job(busy.id).state == "cancelled"


def test_a_worker_that_leaves_in_order_gives_its_task_back_without_blame(state: Path) -> None:
    with orchestrator(state) as running:
        first = running.worker("text", name="first").ready()
        client = running.client()
        job = client.submit("a cat")
        task = first.take()
        first.say(WorkerGoodbye())
        second = running.worker("text", name="second").ready()
        again = second.take()
        assert (again.job, again.attempt) == (task.job, task.attempt + 1)
        assert client.job(job.id).reasons == ()


def test_higher_priority_goes_first_and_equals_in_order(state: Path) -> None:
    with orchestrator(state) as running:
        text = running.worker("text")
        client = running.client()
        client.submit_many([JobRequest(prompt=p, priority=n) for p, n in (("a", 0), ("b", 0), ("c", 5))])
        text.ready()
        prompts = []
        for _ in range(3):
            task = text.take()
            prompts.append(task.recipe.prompt)
            text.finish(task)
            text.ready()
        assert prompts == ["c", "a", "b"]


def test_submissions_wait_for_the_first_worker_to_say_what_the_model_is(state: Path) -> None:
    import threading

    with orchestrator(state) as running:
        client, accepted = running.client(), []
        thread = threading.Thread(target=lambda: accepted.append(client.submit("a cat")))
        thread.start()
        asker = running.client()
        assert asker.stack().model is None
        running.worker("text")
        thread.join(20)
        assert accepted[0].state == "queued"


def test_jobs_of_another_model_wait_for_their_own_workers(state: Path) -> None:
    with orchestrator(state) as running:
        running.worker("text")
        client = running.client()
        old = client.submit("a cat")
        other = running.worker("text", model=MODEL.model_copy(update={"revision": "r2"})).ready()
        new = client.submit("a cat")
        assert other.take().job == new.id
        assert client.job(old.id).state == "queued"


def test_questions_about_what_is_not_there(state: Path) -> None:
    with orchestrator(state) as running:
        running.worker("text")
        client = running.client()
        for ask in (client.job, client.cancel, client.retry, client.pictures):
            with pytest.raises(NotFound, match="no job 'nothing'"):
                ask("nothing")
        job = client.submit("a cat")
        with pytest.raises(NotFound, match="queued"):
            client.pictures(job.id)
        with pytest.raises(Conflict, match="queued"):
            client.retry(job.id)
        with pytest.raises(NotFound, match="without a supervisor"):
            client.scale("text", 2)


def test_hostile_peers_change_nothing_and_the_loop_goes_on(state: Path) -> None:
    rng = random.Random(0)
    with orchestrator(state) as running:
        text = running.worker("text")
        client = running.client()
        job = client.submit("a cat")
        before = client.stack().counts
        for endpoint in (running.endpoints.clients, running.endpoints.workers):
            context, peer = raw_dealer(endpoint)
            for _ in range(200):
                peer.send_multipart([rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(1, 5))])
            good = [bytes(part) for part in wire.encode(GetStack(request=1))]
            for at in range(len(good[1])):
                peer.send_multipart([good[0], good[1][:at]])
            peer.send_multipart([b"\x01" + b"x" * 100_000, b"\x80"])
            peer.send_multipart([bytes(part) for part in wire.encode(Ready())])  # a worker that never said hello
            peer.send_multipart([b"\x01submit", b"\xdf\xff\xff\xff\xff"])
            assert peer.poll(20_000)
            assert error_of(peer.recv_multipart()).code in ("protocol", "version")
            peer.close(linger=0)
            context.term()
        text.settle()
        assert client.stack().counts == before
        assert client.job(job.id) == job
        assert len(client.workers().workers) == 1


def test_a_client_of_another_version_is_told_so(state: Path) -> None:
    with orchestrator(state) as running:
        context, peer = raw_dealer(running.endpoints.clients)
        frames = [bytes(part) for part in wire.encode(GetStack(request=1))]
        peer.send_multipart([b"\x07" + frames[0][1:], frames[1]])
        assert peer.poll(20_000, zmq.POLLIN)
        error = error_of(peer.recv_multipart())
        assert error.code == VersionMismatch.code
        assert "version 7" in error.message
        peer.close(linger=0)
        context.term()


def test_a_second_orchestrator_on_one_state_is_refused(state: Path) -> None:
    import subprocess

    with orchestrator(state) as running:
        second = subprocess.run(running.process.args, capture_output=True, text=True, check=False, timeout=30)
        assert second.returncode == 2
        assert "already running" in second.stderr
        running.worker("text")
        assert running.client().submit("a cat").state == "queued"
