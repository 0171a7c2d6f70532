"""What dies, hangs, comes back or is spoilt on disk costs no job: seen from workers and clients that are fakes."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from orchestrator.storage.artifacts import INLINE_BYTES
from protocol.client.client import Client
from protocol.errors import Conflict, JobFailed, NotFound, QueueFull
from protocol.job import JobRequest
from protocol.messages.worker import CancelTask, Committed, Part, Result, Task, TaskFailed
from protocol.tensors import Tensor
from tests.fakes import OUTPUTS, Orchestrator, orchestrator


def encoded(running: Orchestrator, client: Client, count: int = 1, **options: int) -> list[str]:
    """Jobs that wait to be denoised."""
    text = running.worker("text").ready()
    jobs = client.submit_many([JobRequest(prompt=f"cat {i}", **options) for i in range(count)])
    for _ in range(count):
        text.finish(text.take())
        text.hear(Committed)
        text.ready()
    return [job.id for job in jobs]


def decoded(running: Orchestrator, client: Client, job: str) -> None:
    """Take a denoised job to its end."""
    vae = running.worker("vae").ready()
    vae.finish(vae.take())
    assert client.wait(job, 20).state == "done"


def test_another_worker_gets_the_checkpoint_also_after_the_orchestrator_was_killed(state: Path) -> None:
    with orchestrator(state) as running:
        (job,) = encoded(running, client := running.client())
        first = running.worker("denoise").ready()
        task = first.take()
        assert first.inputs() == {"prompt_embeds": bytes(8)}
        first.progress(task, 1)
        first.progress(task, 2)
        first.progress(task, 3, saved=False)
        first.settle()
        assert client.job(job).step == 3
        running.restart()
        second = running.worker("denoise").ready()
        again = second.take()
        assert second.inputs() == {"prompt_embeds": bytes(8), "checkpoint:state": b"\x00\x02"}
        assert again.attempt > task.attempt
        assert running.client().job(job).step == 2
        second.fail(again)  # what it began with may be to blame
        third = second.take()
        assert second.inputs() == {"prompt_embeds": bytes(8)}
        second.finish(third)
        decoded(running, running.client(), job)


def test_a_worker_that_comes_back_goes_on_with_what_it_has_in_hand(state: Path) -> None:
    with orchestrator(state) as running:
        (job,) = encoded(running, running.client())
        worker = running.worker("denoise", pid=7).ready()
        task = worker.take()
        worker.progress(task, 1)
        worker.settle()
        running.restart()
        idle = running.worker("denoise").ready()
        back = running.worker("denoise", pid=7).ready(current_task=(job, "denoise", task.attempt))
        back.progress(task, 3)
        back.settle()
        client = running.client()
        assert (client.job(job).step, client.job(job).attempt) == (3, task.attempt)
        back.finish(task)
        back.hear(Committed)
        back.ready()
        decoded(running, client, job)
        assert not any(isinstance(seen.message, Task) for seen in idle.seen)
        (record,) = [record for record in client.job(job).records if record.stage == "denoise"]
        assert record.attempt == task.attempt


def test_a_link_that_was_lost_and_made_again_costs_nothing(state: Path) -> None:
    """The same process under a new identity, before anybody missed it."""
    with orchestrator(state) as running:
        (job,) = encoded(running, client := running.client())
        worker = running.worker("denoise", pid=7).ready()
        task = worker.take()
        back = running.worker("denoise", pid=7).ready(current_task=(job, "denoise", task.attempt))
        back.finish(task)
        back.hear(Committed)
        decoded(running, client, job)
        assert client.job(job).reasons == ()
        assert len([w for w in client.workers().workers if w.stage == "denoise"]) == 1


def test_what_somebody_else_has_begun_is_taken_out_of_the_hands_of_who_comes_late(state: Path) -> None:
    with orchestrator(state) as running:
        (job,) = encoded(running, client := running.client())
        gone = running.worker("denoise", pid=7).ready()
        old = gone.take()
        running.restart()
        new = running.worker("denoise").ready()
        task = new.take()
        late = running.worker("denoise", pid=7).ready(current_task=(job, "denoise", old.attempt))
        assert late.hear(CancelTask).attempt == old.attempt
        late.finish(old)
        late.hear(Committed)  # or it would hold on to it
        new.finish(task)
        new.hear(Committed)
        decoded(running, client := running.client(), job)
        (record,) = [record for record in client.job(job).records if record.stage == "denoise"]
        assert record.attempt == task.attempt > old.attempt


def test_a_job_that_fails_its_worker_three_times_at_the_same_point_is_set_aside(state: Path) -> None:
    with orchestrator(state) as running:
        client = running.client()
        poison, fine = encoded(running, client, 2)
        worker = running.worker("denoise").ready()
        drops = 0
        while drops < 4:  # twice it comes further, which begins the count anew; then twice more at the same point
            task = worker.take()
            if task.job == fine:
                worker.finish(task)
            else:
                if drops < 2:
                    worker.progress(task, drops + 1)
                drops += 1
            worker.ready()  # without a word of the task, if it was the poison
        with pytest.raises(JobFailed, match="dropped it"):
            client.wait(poison, 20)
        assert len(client.job(poison).reasons) == 4
        assert [job.id for job in client.jobs(["failed"])] == [poison]
        decoded(running, client, fine)
        client.retry(poison)
        assert worker.take().job == poison
        assert set(worker.inputs()) == {"prompt_embeds"}


def test_a_worker_that_comes_no_further_loses_its_task(state: Path) -> None:
    with orchestrator(state, step_timeout=0.5) as running:
        (job,) = encoded(running, client := running.client())
        stuck = running.worker("denoise").ready()
        task = stuck.take()
        other = running.worker("denoise").ready()
        while not other.socket.poll(100):
            stuck.settle()  # its loop is alive all the while
        again = other.take()
        assert (again.job, again.attempt > task.attempt) == (job, True)
        assert "came no further" in client.job(job).reasons[0]


def spoil(state: Path, kind: str) -> None:
    """Change a byte of an artifact on disk."""
    with sqlite3.connect(state / "jobs.sqlite", timeout=20) as db:
        ((key, file, data),) = db.execute("SELECT key, file, data FROM artifacts WHERE kind = ?", (kind,))
        if file is None:
            db.execute("UPDATE artifacts SET data = ? WHERE key = ?", (bytes([data[0] ^ 1]) + data[1:], key))
        else:
            path = state / "artifacts" / file
            content = bytearray(path.read_bytes())
            content[5] ^= 1
            path.write_bytes(content)


@pytest.mark.parametrize("kind", ["text", "checkpoint", "latents"])
def test_what_is_spoilt_on_disk_is_made_again(kind: str, state: Path) -> None:
    with orchestrator(state) as running:
        (job,) = encoded(running, client := running.client())
        worker = running.worker("denoise").ready()
        task = worker.take()
        worker.progress(task, 2)
        if kind == "latents":
            worker.finish(task)
            worker.hear(Committed)
            worker.ready()
        worker.settle()
        spoil(state, kind)
        match kind:
            case "checkpoint":
                worker.ready()  # dropped
                again = worker.take()
                assert set(worker.inputs()) == {"prompt_embeds"}
            case "text":
                worker.ready()
                (text,) = (w for w in running.workers if w.stage == "text")
                text.finish(text.take())
                again = worker.take()
                assert set(worker.inputs()) == {"prompt_embeds", "checkpoint:state"}
            case _:
                running.worker("vae").ready()
                again = worker.take()
        worker.finish(again)
        worker.hear(Committed)
        decoded(running, client, job)


def test_spoilt_pictures_are_made_again_and_never_shown(state: Path) -> None:
    with orchestrator(state) as running:
        (job,) = encoded(running, client := running.client())
        denoise = running.worker("denoise").ready()
        denoise.finish(denoise.take())
        denoise.hear(Committed)
        denoise.ready()
        decoded(running, client, job)
        wanted = client.pictures(job)[0].tobytes()
        spoil(state, "pictures")
        with pytest.raises(Conflict, match="being made again"):
            client.pictures(job)
        denoise.finish(denoise.take())
        decoded(running, client, job)
        assert client.pictures(job)[0].tobytes() == wanted


def test_a_drained_stage_gets_nothing_more_until_told_otherwise(state: Path) -> None:
    with orchestrator(state) as running:
        client = running.client()
        client.drain("denoise")
        encoded(running, client)
        running.restart()
        client = running.client()
        assert client.workers().drained == ("denoise",)
        worker = running.worker("denoise").ready()
        worker.settle()
        assert not any(isinstance(seen.message, Task) for seen in worker.seen)
        client.drain("denoise", on=False)
        worker.take()


def test_what_ended_long_ago_is_removed_with_what_it_left(state: Path) -> None:
    with orchestrator(state) as running:
        done, waiting = encoded(running, client := running.client(), 2)
        denoise = running.worker("denoise").ready()
        denoise.finish(denoise.take())
        denoise.hear(Committed)
        decoded(running, client, done)
        assert client.collect_garbage(3600) == (0, 0)
        assert client.collect_garbage(0) == (1, 12)
        with pytest.raises(NotFound):
            client.job(done)
        assert client.job(waiting).state == "denoise"
        assert dict(client.stack().counts) == {"denoise": 1}


def test_no_job_is_taken_that_there_is_no_room_for(state: Path) -> None:
    with orchestrator(state, disk_floor=1 << 60) as running:
        running.worker("text")
        with pytest.raises(QueueFull, match="are kept for jobs"):
            running.client().submit("a cat")
    big = Tensor("decode:0", "uint8", (INLINE_BYTES * 2,), bytes(INLINE_BYTES * 2))
    with orchestrator(state, queue_bytes=INLINE_BYTES) as running:
        (job,) = encoded(running, client := running.client())
        worker = running.worker("denoise").ready()
        task = worker.take()
        worker.say(Result(job=task.job, stage="denoise", attempt=task.attempt, seconds=0.1, next="vae"), big)
        worker.hear(Committed)
        with pytest.raises(QueueFull, match="Unfinished jobs hold"):
            client.submit("another cat")
        decoded(running, client, job)
        client.submit("another cat")


def test_a_number_that_was_cancelled_before_a_crash_may_come_again(state: Path) -> None:
    """Attempts that a killed orchestrator handed out may not have been kept; a worker that tells of one is believed."""
    with orchestrator(state) as running:
        (job,) = encoded(running, running.client())
        worker = running.worker("denoise", pid=7).ready()
        worker.take()
        running.restart()
        back = running.worker("denoise", pid=7).ready(current_task=(job, "denoise", 40))
        back.settle()
        client = running.client()
        assert client.job(job).attempt == 40
        back.say(TaskFailed(job=job, stage="denoise", attempt=40, reason="cancelled", retry=False, cancelled=True))
        back.ready()
        again = back.take()
        assert again.attempt == 41
        back.finish(again)
        decoded(running, client, job)
        assert client.job(job).reasons == ()


def test_pictures_in_parts_count_once_all_are_there_whoever_dies_meanwhile(state: Path) -> None:
    part = Tensor("pictures", "uint8", (2, 2, 2, 3), bytes(range(100, 124)))
    with orchestrator(state) as running:
        (job,) = encoded(running, client := running.client(), num_images=5)
        denoise = running.worker("denoise").ready()
        denoise.finish(denoise.take())
        vae = running.worker("vae", pid=7).ready()
        task = vae.take()
        key: dict[str, Any] = {"job": job, "stage": "vae", "attempt": task.attempt}
        vae.say(Part(**key, number=1), part)
        vae.say(Result(**key, seconds=0.1, parts=2), OUTPUTS["vae"])  # one has got lost
        vae.ready()
        again = vae.take()
        key["attempt"] = again.attempt
        assert "with 1 of its 2 parts" in client.job(job).reasons[-1]
        vae.say(Part(**key, number=1), part)
        vae.settle()
        running.restart()  # what was said so far may be there, or not: it is said again
        back = running.worker("vae", pid=7).ready(current_task=(job, "vae", again.attempt))
        for number in (1, 2):
            back.say(Part(**key, number=number), part)
        back.say(Result(**key, seconds=0.1, parts=2), OUTPUTS["vae"])
        back.hear(Committed)
        client = running.client()
        assert client.wait(job, 20).state == "done"
        found = client.raw_pictures(job)[1]
        assert found.shape == (5, 2, 2, 3)
        assert bytes(found.data) == bytes(range(12)) + 2 * bytes(range(100, 124))
        assert client.collect_garbage(0)[0] == 1


def test_parts_of_a_job_that_was_cancelled_go_with_it(state: Path) -> None:
    with orchestrator(state) as running:
        (job,) = encoded(running, client := running.client(), num_images=2)
        denoise = running.worker("denoise").ready()
        denoise.finish(denoise.take())
        vae = running.worker("vae").ready()
        task = vae.take()
        large = Tensor("pictures", "uint8", (1, 256, 256, 3), bytes(256 * 256 * 3))
        vae.say(Part(job=job, stage="vae", attempt=task.attempt, number=1), large)
        vae.settle()
        assert list((state / "artifacts").iterdir())
        client.cancel(job)
        client.cancel(job)  # what the first one let go of is removed once that is on the disk
        assert client.job(job).state == "cancelled"
        assert not [path for path in (state / "artifacts").iterdir() if path.name.startswith("pictures")]
