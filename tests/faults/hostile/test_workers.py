"""Workers with keys that lie about themselves, or about what they have done: their word counts for their own things."""

import os
from pathlib import Path

import pytest

from protocol import wire
from protocol.curve_keys import PeerKey
from protocol.gpu_memory import Lease, WeightNeed
from protocol.job import JobRequest
from protocol.messages.common import Message
from protocol.messages.supervisor import KillProcess, SupervisorHello
from protocol.messages.worker import Committed, Part, Progress, Result, Task, TaskFailed, WorkerGoodbye
from protocol.sockets import receive
from protocol.tensors import Tensor
from tests.fakes import MODEL, OUTPUTS, FakeWorker, Orchestrator, raw_dealer
from tests.faults.hostile.peers import guarded, hostile, key_of


def encoded(running: Orchestrator, count: int = 1, **options: int) -> list[str]:
    """Jobs that wait to be denoised."""
    jobs = running.client().submit_many([JobRequest(prompt=f"cat {n}", **options) for n in range(count)])
    text = running.worker("text").ready()
    for _ in jobs:
        text.finish(text.take())
        text.hear(Committed)
        text.ready()
    return [job.id for job in jobs]


def test_a_worker_that_poses_as_another_process_ends_and_displaces_nobody(state: Path) -> None:
    with guarded(state) as running:
        context, supervisor = raw_dealer(running.endpoints.workers)
        supervisor.send_multipart(wire.encode(SupervisorHello(pid=1)))
        honest = running.worker("denoise", pid=77).ready()
        client = running.client()
        for pid in (running.process.pid, 77, os.getpid()):
            liar = running.worker("denoise", pid=pid, key=key_of(running, f"liar{pid}", "worker")).ready()
            liar.close()  # it falls silent
            running._opened.remove(liar)
        while sum(worker.stage == "denoise" for worker in client.workers().workers) > 1:
            honest.settle()
        (job,) = encoded(running)
        honest.finish(honest.take())  # it is still there
        honest.hear(Committed)
        assert client.job(job).reasons == ()
        said: list[Message] = []
        while supervisor.poll(0):
            said.append(wire.decode(receive(supervisor)).message)
        assert not [message for message in said if isinstance(message, KillProcess)]
        supervisor.close(linger=0)
        context.term()


def test_what_a_key_says_of_a_model_changes_nothing(state: Path) -> None:
    with guarded(state) as running:
        small = MODEL.model_copy(update={"max_pixels": 1})
        running.worker("denoise", model=small, key=key_of(running, "liar", "worker")).ready()
        assert running.client().submit("a cat").state == "queued"


def test_what_a_key_says_of_gpus_books_nothing_of_this_machines(state: Path) -> None:
    gpus = {0: {"budget": 10**9, "driver": False}}
    with guarded(state, gpus=gpus) as running:
        need = WeightNeed(weights=10**8, least=10**8, workspace=10**7)
        liar = running.worker("vae", gpus=(0,), key=key_of(running, "liar", "worker"))
        liar.ready(
            need, context_bytes=(1 << 40,), kept_bytes=(1 << 40,), leases=(Lease(bytes=1 << 40, weight_bytes=1),)
        )
        honest = running.worker("text", gpus=(0,)).ready(need, context_bytes=(1000,))
        running.client().submit("a cat")
        lease = honest.obey()
        assert lease.leases[0].bytes >= need.weights
        assert honest.take().stage == "text"


def to_be_decoded(running: Orchestrator, key: PeerKey | None = None, **options: int) -> tuple[FakeWorker, Task]:
    """A worker of the vae stage, a key's own where one is given, with the task of a job's last visit."""
    encoded(running, **options)
    denoise = running.worker("denoise").ready()
    denoise.finish(denoise.take())
    vae = running.worker("vae", key=key).ready()
    return vae, vae.take()


PICTURE = (2, 2, 3)
WRONG = {
    "shape": Tensor("pictures", "uint8", (1, 2, 6), bytes(12)),
    "channels": Tensor("pictures", "uint8", (1, 2, 2, 4), bytes(16)),
    "dtype": Tensor("pictures", "float32", (1, *PICTURE), bytes(48)),
    "number": Tensor("pictures", "uint8", (3, *PICTURE), bytes(36)),
    "none": Tensor("pictures", "uint8", (0, *PICTURE), b""),
    "name": Tensor("picture", "uint8", (1, *PICTURE), bytes(12)),
}


@pytest.mark.parametrize("wrong", ["shape", *(pytest.param(other, marks=pytest.mark.all) for other in [*WRONG][1:])])
def test_pictures_that_are_none_fail_their_attempt_with_the_reason(state: Path, wrong: str) -> None:
    with guarded(state) as running:
        client, (vae, task) = running.client(), to_be_decoded(running)
        job = task.job
        vae.say(Result(job=job, stage="vae", attempt=task.attempt, seconds=0.1), WRONG[wrong])
        vae.hear(Committed)
        vae.ready()
        again = vae.take()
        assert "ended the job with" in client.job(job).reasons[-1]
        vae.finish(again)
        assert client.wait(job, 20).state == "done"


def test_parts_beyond_what_a_job_has_are_refused_and_not_kept(state: Path) -> None:
    with guarded(state) as running:
        client, (vae, task) = running.client(), to_be_decoded(running)
        job = task.job
        vae.say(Part(job=job, stage="vae", attempt=task.attempt, number=9), OUTPUTS["vae"])
        vae.settle()
        assert "part 9" in client.job(job).reasons[-1]
        vae.ready()
        vae.finish(vae.take())
        assert client.wait(job, 20).state == "done"


@pytest.mark.all
def test_a_worker_that_vanishes_with_every_task_costs_no_job(state: Path) -> None:
    """A key's worker takes a task and is gone, again and again; this machine's own does them all."""
    with guarded(state) as running:
        client = running.client()
        jobs = encoded(running, 6)
        with hostile(running, "vanish", role="worker", model=True):
            while not any(worker.stage == "denoise" for worker in client.workers().workers):
                pass
            honest = running.worker("denoise", pid=5).ready()
            for _ in jobs:
                honest.finish(honest.take_in_time())
                honest.hear(Committed)
                honest.ready()
        vae = running.worker("vae").ready()
        for _ in jobs:
            vae.finish(vae.take())
            vae.hear(Committed)
            vae.ready()
        assert {client.wait(job, 30).state for job in jobs} == {"done"}
        assert all(client.job(job).reasons == () for job in jobs)


@pytest.mark.all
def test_a_key_whose_worker_was_gone_with_a_task_rests_and_then_gets_one_again(state: Path) -> None:
    with guarded(state) as running:
        (job,), key = encoded(running), key_of(running, "box", "worker")
        first = running.worker("denoise", key=key, pid=7).ready()
        first.take()
        first.close()
        running._opened.remove(first)
        second = running.worker("denoise", key=key, pid=8).ready()
        second.finish(second.take_in_time())
        second.hear(Committed)
        assert running.client().job(job).records[-1].stage == "denoise"


@pytest.mark.all
def test_steps_beyond_any_jobs_count_for_no_progress(state: Path) -> None:
    with guarded(state, step_timeout=1.5) as running:
        (job,) = encoded(running, steps=4)
        liar = running.worker("denoise", key=key_of(running, "liar", "worker")).ready()
        task = liar.take()
        step = 0
        while not liar.socket.poll(20):
            step += 1
            liar.say(Progress(job=task.job, stage=task.stage, attempt=task.attempt, step=step, steps=1))
        # Nothing was to come but beats: it was given up, and its messages are refused.
        assert "came no further" in running.client().job(job).reasons[-1]


@pytest.mark.parametrize(
    "how",
    ["for ever", *(pytest.param(how, marks=pytest.mark.all) for how in ("again", "cancelled", "nothing", "goodbye"))],
)
def test_a_key_whose_worker_fails_every_task_costs_no_job_where_this_machine_has_others(state: Path, how: str) -> None:
    with guarded(state) as running:
        (job,) = encoded(running)
        liar = running.worker("denoise", key=key_of(running, "liar", "worker")).ready()
        task = liar.take()
        honest = running.worker("denoise").ready()
        key = {"job": task.job, "stage": task.stage, "attempt": task.attempt}
        if how == "goodbye":
            liar.say(WorkerGoodbye())
        elif how != "nothing":
            liar.say(TaskFailed(**key, reason="no", retry=how == "again", cancelled=how == "cancelled"))
        liar.ready()
        honest.finish(honest.take_in_time())
        honest.hear(Committed)
        assert running.client().job(job).reasons == ()


@pytest.mark.all
def test_many_pictures_of_a_keys_worker_come_whole_however_fast_it_is_sent(state: Path) -> None:
    """More at once than may wait for one key: no more is read until there is room, and nothing is let go."""
    count, part = 16, Tensor("pictures", "uint8", (1, 1536, 1536, 3), bytes(1536 * 1536 * 3))
    with guarded(state, keep_pictures=1 << 30) as running:
        client, box = running.client(), key_of(running, "box", "worker")
        vae, task = to_be_decoded(running, box, num_images=count, width=512, height=512)
        job = task.job
        key = {"job": job, "stage": "vae", "attempt": task.attempt}
        for number in range(1, count):
            vae.say(Part(**key, number=number), part)
        vae.say(Result(**key, seconds=1.0, parts=count - 1), part)
        vae.hear(Committed)
        assert client.wait(job, 60).reasons == ()
        assert client.raw_pictures(job)[1].shape[0] == count


@pytest.mark.all
def test_a_job_that_only_keys_workers_can_take_and_never_do_ends_with_the_reason(state: Path, tmp_path: Path) -> None:
    """This machine has a worker for it that is not free: its key's tries are handed back at first, and count then."""
    (tmp_path / "sitecustomize.py").write_text(
        "import orchestrator.dispatch.key_trust as t\nt.FIRST_SECONDS = t.MOST_SECONDS = 0.02\n"
    )
    with guarded(state, {"PYTHONPATH": str(tmp_path)}) as running:
        first, second = encoded(running, 2)
        busy = running.worker("denoise").ready()
        busy.take()
        liar = running.worker("denoise", key=key_of(running, "liar", "worker")).ready()
        client = running.client()
        while client.job(second).state != "failed":
            task = liar.take_in_time()
            busy.say_beat()
            liar.say(TaskFailed(job=task.job, stage=task.stage, attempt=task.attempt, reason="no", retry=False))
            liar.ready()
            liar.settle()
        assert len(client.job(second).reasons) == 3
        assert client.job(first).state == "denoise"
