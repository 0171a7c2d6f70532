"""A disk that is full or can't be written, clocks that jump, results that come twice, late or out of order."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.storage.artifacts import INLINE_BYTES
from protocol.messages.worker import Committed, Result
from protocol.tensors import Tensor
from tests.fakes import OUTPUTS, orchestrator
from tests.stacks import running_stack, triptych

CLOCK = """
import itertools, time
real, turn = time.time, itertools.count()
time.time = lambda: real() + (-3e8, 0.0, 1e9, 7e4)[next(turn) % 4]
"""


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A folder on a disk of 16 megabytes: four times what SQLite lets its log grow to."""
    with tempfile.TemporaryDirectory(prefix="tt-") as folder:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, check=False
        )
        if made.returncode:
            pytest.skip("only root may mount a small disk")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def test_a_full_disk_loses_nothing_that_was_accepted(small_disk: Path) -> None:
    big = Tensor("decode:0", "uint8", (INLINE_BYTES * 2,), bytes(INLINE_BYTES * 2))
    with orchestrator(small_disk, disk_floor=0) as running:
        text, denoise = running.worker("text").ready(), running.worker("denoise", pid=7).ready()
        job = running.client().submit("a cat")
        text.finish(text.take())
        text.hear(Committed)  # else it would be the one to say it again: tasks go out before the commit
        task = denoise.take()
        ballast = fill(small_disk)
        result = Result(job=task.job, stage="denoise", attempt=task.attempt, seconds=0.1, next="vae")
        denoise.say(result, big)
        running.process.wait(timeout=20)  # it keeps its word rather than go on without a disk
        log = running.log()
        assert running.process.returncode == 7, log
        assert "can't be" in log
        assert "Traceback" not in log
        ballast.unlink()
        running.start()
        back = running.worker("denoise", pid=7).ready(current_task=(job.id, "denoise", task.attempt))
        back.say(result, big)  # the worker has held on to it
        back.hear(Committed)
        vae = running.worker("vae").ready()
        vae.finish(vae.take())
        client = running.client()
        assert client.wait(job.id, 20).reasons == ()
        assert client.pictures(job.id)[0].tobytes() == bytes(range(12))


def fill(disk: Path) -> Path:
    """Leave no room; return the file that takes it."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb") as out:
        while True:
            out.write(bytes(4096))
            out.flush()
    return ballast


def test_a_stack_waits_while_its_disk_is_full_and_goes_on_when_there_is_room(
    small_disk: Path, flux_schnell: Path
) -> None:
    options = {"seed": 1, "width": 32, "height": 32}
    with running_stack(
        small_disk / "state", "--model", str(flux_schnell), "--device", "cpu", "--disk-floor", "0"
    ) as stack:
        job = stack.client.submit("a red circle", steps=400, **options)
        first = stack.client.stack().pid
        ballast = fill(small_disk)
        with contextlib.suppress(OSError):
            while True:  # until the orchestrator, which can keep nothing any more, has ended
                os.kill(first, 0)
                os.sched_yield()
        assert stack.process.poll() is None
        ballast.unlink()
        assert stack.client.wait(job.id, timeout=120).state == "done"


def test_a_disk_that_cannot_be_written_is_named_and_nothing_starts(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = triptych("up", folder=small_disk / "state")
    assert done.returncode == 7
    assert "Read-only" in done.stderr
    assert "Traceback" not in done.stderr


def test_clocks_that_jump_change_nothing(state: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    with orchestrator(state, {"PYTHONPATH": str(tmp_path)}, keep_jobs=3600.0) as running:
        stages = [running.worker(stage).ready() for stage in ("text", "denoise", "vae")]
        client = running.client()
        jobs = [client.submit(f"cat {number}").id for number in range(8)]
        for worker in stages:
            for _ in jobs:
                worker.finish(worker.take())
                worker.ready()
        assert [client.wait(job, 20).state for job in jobs] == ["done"] * 8
        assert [job.id for job in reversed(client.jobs())] == jobs


def test_results_that_come_twice_late_or_out_of_order_count_once(state: Path) -> None:
    with orchestrator(state) as running:
        text, denoise, vae = (running.worker(stage).ready() for stage in ("text", "denoise", "vae"))
        client = running.client()
        job = client.submit("a cat").id
        first = text.take()
        for _ in range(3):
            text.finish(first)
        text.ready()
        task = denoise.take()
        text.finish(first)  # once more, the next stage being under way
        other = Tensor("decode:0", "float32", (1, 2), b"\x01" * 8)
        denoise.finish(task)
        denoise.say(Result(job=job, stage="denoise", attempt=task.attempt, seconds=0.1, next="vae"), other)
        denoise.progress(task, 2)  # out of order
        denoise.ready()
        last = vae.take()
        assert vae.inputs() == {"decode:0": bytes(8)}
        for worker in (vae, denoise):  # also from one that was never asked
            worker.say(Result(job=job, stage="vae", attempt=last.attempt, seconds=0.1), OUTPUTS["vae"])
        denoise.finish(task)
        done = client.wait(job, 20)
        assert [record.stage for record in done.records] == ["text", "denoise", "vae"]
        assert done.attempt == 3
        for worker in (text, denoise, vae):
            worker.settle()
        assert client.job(job) == done
        assert sum(isinstance(seen.message, Committed) for seen in text.seen) == 4  # each is let go of
