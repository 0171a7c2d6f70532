"""Whole stacks: what dies comes back, what is scaled is scaled, and nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from protocol.errors import NoStack
from protocol.job import JobRequest
from protocol.messages.client import Workers
from tests.stacks import TRIPTYCH, RunningStack, running_stack, triptych
from tests.tiny import environment

SMALL = {"width": 32, "height": 32, "steps": 2}


def until(stack: RunningStack, holds: Callable[[Workers], bool], patience: float = 90.0) -> Workers:
    """Ask until something holds of the workers; fails after too long."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        workers = stack.client.workers()
        if holds(workers):
            return workers
        time.sleep(0.05)
    raise AssertionError(f"never came to hold: {stack.client.workers()}")


def pid_of(workers: Workers, name: str) -> int:
    return next(worker.pid for worker in workers.workers if worker.name == name)


def up(workers: Workers, stage: str) -> int:
    return sum(worker.stage == stage and worker.state != "loading" for worker in workers.workers)


def one_up(stage: str, workers: Workers) -> bool:
    return up(workers, stage) == 1


def test_each_stage_killed_between_jobs_comes_back_and_the_bits_stay(state: Path, flux_dev: Path) -> None:
    with running_stack(state, "--model", str(flux_dev), "--device", "cpu") as stack:
        _, wanted = stack.picture("a red star", seed=1, **SMALL)
        for stage in ("text", "denoise", "vae"):
            old = pid_of(stack.client.workers(), f"{stage}-1")
            os.kill(old, signal.SIGKILL)
            job = stack.client.submit(
                "a red star", seed=1, max_sequence_length=511 if stage == "text" else None, **SMALL
            )
            stack.client.wait(job.id, timeout=120)
            new = until(stack, partial(one_up, stage))
            assert pid_of(new, f"{stage}-1") != old
            if stage != "text":
                assert stack.pictures(job.id).equal(wanted)
        process = next(p for p in stack.client.workers().processes if p.name == "vae-1")
        assert process.restarts == 1
        assert "signal 9" in process.reason
        stack.client.restart("denoise")
        until(stack, lambda w: pid_of(w, "denoise-1") != pid_of(new, "denoise-1") if up(w, "denoise") else False)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have a spare process instead")
def test_workers_are_forked_and_a_stack_goes_on_without_its_fork_server(state: Path, flux_dev: Path) -> None:
    with running_stack(state, "--model", str(flux_dev), "--device", "cpu") as stack:
        _, wanted = stack.picture("a red star", seed=1, **SMALL)
        before = stack.client.workers()
        assert {psutil.Process(worker.pid).ppid() for worker in before.workers} == {stack.process.pid}
        server = next(p.pid for p in before.processes if p.name == "forkserver")
        assert "fork_server" in " ".join(psutil.Process(pid_of(before, "denoise-1")).cmdline())
        killed = time.time()
        for pid in (server, pid_of(before, "denoise-1")):
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        _, again = stack.picture("a red star", seed=1, **SMALL)
        assert again.equal(wanted)
        after = stack.client.workers()
        assert psutil.Process(pid_of(after, "denoise-1")).ppid() == stack.process.pid
        twin = next(p.pid for p in after.processes if p.name == "forkserver")
        assert psutil.Process(twin).create_time() < killed, "nothing had to be imported again"


@pytest.mark.all
def test_where_forking_is_impossible_a_spare_process_becomes_the_next_worker(
    state: Path, flux_dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIPTYCH_FORK", "0")

    def spare(workers: Workers) -> int | None:
        """The process that waits, once it has imported everything."""
        return next((p.pid for p in workers.processes if p.name == "spare" and p.state == "running"), None)

    with running_stack(state, "--model", str(flux_dev), "--device", "cpu") as stack:
        _, wanted = stack.picture("a red star", seed=1, **SMALL)
        found = until(stack, lambda w: spare(w) is not None)
        waiting = spare(found)
        os.kill(pid_of(found, "denoise-1"), signal.SIGKILL)
        _, again = stack.picture("a red star", seed=1, **SMALL)
        assert again.equal(wanted)
        assert pid_of(stack.client.workers(), "denoise-1") == waiting
        until(stack, lambda w: spare(w) not in (None, waiting))


@pytest.mark.all
def test_two_denoisers_share_the_jobs(state: Path, flux_dev: Path) -> None:
    with running_stack(state, "--model", str(flux_dev), "--device", "cpu") as stack:
        assert triptych("scale", "denoise=2", folder=state).returncode == 0
        until(stack, lambda w: up(w, "denoise") == 2)
        jobs = stack.client.submit_many(
            [JobRequest(prompt="a star", seed=i, **(SMALL | {"steps": 6})) for i in range(8)]
        )
        workers = {stack.client.wait(job.id, timeout=120).records[1].worker for job in jobs}
        assert workers == {"denoise-1", "denoise-2"}
        stack.client.scale("denoise", 1)
        until(stack, lambda w: up(w, "denoise") == 1)


@pytest.mark.all
def test_without_a_vae_worker_jobs_wait_for_one(state: Path, flux_dev: Path) -> None:
    with running_stack(state, "--model", str(flux_dev), "--device", "cpu", "--workers", "vae=0") as stack:
        job = stack.client.submit("a star", seed=1, **SMALL)
        for event in stack.client.events([job.id], timeout=60):
            if event.state == "vae":
                break
        by_hand = subprocess.Popen(
            [*TRIPTYCH, "worker", "vae", "--state", str(state), "--model", str(flux_dev), "--device", "cpu"],
            env=environment(), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert stack.client.wait(job.id, timeout=90).state == "done"
        finally:
            by_hand.terminate()
            assert by_hand.wait(20) == 0


def test_a_killed_orchestrator_comes_back_with_its_jobs(state: Path, flux_dev: Path) -> None:
    with running_stack(state, "--model", str(flux_dev), "--device", "cpu") as stack:
        _, wanted = stack.picture("a red star", seed=9, **SMALL)
        jobs = stack.client.submit_many([JobRequest(prompt=f"star {i}", seed=i, **SMALL) for i in range(5)])
        os.kill(stack.client.stack().pid, signal.SIGKILL)
        for job in jobs:
            assert stack.client.wait(job.id, timeout=60).state == "done"
        assert stack.picture("a red star", seed=9, **SMALL)[1].equal(wanted)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.all)])
def test_no_process_outlives_the_supervisor(number: signal.Signals, state: Path, flux_dev: Path) -> None:
    command = [*TRIPTYCH, "up", "--state", str(state), "--json", "--model", str(flux_dev), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment())
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(number)
        process.communicate(timeout=30)
    assert len(children) >= 4  # orchestrator, three workers, and what starts those
    _, alive = psutil.wait_procs(children, timeout=15)
    assert alive == []
    for _ in range(2):  # and the folder is free for the next
        with contextlib.suppress(NoStack), running_stack(state, "--model", str(flux_dev), "--device", "cpu"):
            break


def test_a_second_stack_on_the_same_state_is_refused_and_others_run_beside(stack: RunningStack, flux_dev: Path) -> None:
    second = triptych("up", folder=stack.folder)
    assert second.returncode == 2
    assert "already running" in second.stderr
    assert stack.client.stack().model is not None


def test_a_model_that_cannot_be_loaded_stops_the_stack_with_the_reason(state: Path) -> None:
    missing = triptych("up", "--model", "nobody/nothing-here", folder=state)
    assert missing.returncode == 4
    assert "nobody/nothing-here" in missing.stderr
    assert "Traceback" not in missing.stderr
