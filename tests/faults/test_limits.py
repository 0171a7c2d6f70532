"""Workers whose processes are held to less memory, or fewer files, than they want: what was accepted goes on."""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from protocol.client.client import Client
from protocol.job import ENDED
from scripts.faults.saboteur import patiently
from tests.stacks import RunningStack, running_stack

pytestmark = pytest.mark.all
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.fixture
def stack(state: Path) -> Iterator[RunningStack]:
    with running_stack(state, "--model", "demo", "--device", "cpu") as running:
        yield running


def pid_of(client: Client, stage: str) -> int:
    return next(worker.pid for worker in client.workers().workers if worker.stage == stage)


def test_a_worker_that_finds_no_memory_fails_its_job_with_the_reason_and_does_the_next(stack: RunningStack) -> None:
    wanted = stack.picture("a red circle", seed=1, width=256, height=256)[1]
    pid = pid_of(stack.client, "vae")
    held = psutil.Process(pid).memory_info().vms
    resource.prlimit(pid, resource.RLIMIT_AS, (held, resource.RLIM_INFINITY))
    job = stack.client.submit("a red circle", seed=1, width=256, height=256, num_images=8)
    patiently(lambda: stack.client.job(job.id).state in ENDED)  # it may have found enough after all
    if psutil.pid_exists(pid):
        resource.prlimit(pid, resource.RLIMIT_AS, UNLIMITED)
    if stack.client.job(job.id).state == "failed":
        reason = stack.client.job(job.id).reasons[-1]
        assert any(word in reason.lower() for word in ("memory", "died")), reason
        stack.client.retry(job.id)
        stack.client.wait(job.id, 120)
    assert stack.pictures(job.id)[:1].shape == wanted.shape
    assert stack.picture("a red circle", seed=1, width=256, height=256)[1].equal(wanted)


def test_a_worker_that_may_open_nothing_more_is_replaced_when_it_must_connect_anew(stack: RunningStack) -> None:
    wanted = stack.picture("a blue star", seed=2, width=64, height=64)[1]
    pids = {stage: pid_of(stack.client, stage) for stage in ("text", "denoise", "vae")}
    for pid in pids.values():
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (psutil.Process(pid).num_fds(), hard))
    job = stack.client.submit("a blue star", seed=2, width=64, height=64, steps=50)
    os.kill(stack.client.stack().pid, signal.SIGKILL)
    patiently(lambda: stack.client.job(job.id).state == "done")
    assert all("Too many open files" in reason or "died" in reason for reason in stack.client.job(job.id).reasons)
    assert all(pid_of(stack.client, stage) != pid for stage, pid in pids.items() if stage == "denoise")
    assert stack.picture("a blue star", seed=2, width=64, height=64)[1].equal(wanted)
