"""A stack with other hosts: real agents with workers of their own, over TCP and CURVE, on this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from orchestrator.access import KeyFolder
from protocol.client.client import Client
from protocol.errors import NotFound
from protocol.job import JobRequest
from protocol.views import HostView, WorkerView
from scripts.faults.saboteur import patiently
from tests.stacks import RunningStack, host_key, joined_host, remote_endpoint, running_stack, triptych

REQUEST = JobRequest(prompt="a red star", seed=1, steps=40, width=32, height=32)

FAKE_CLOCK = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))  # of Debian


@pytest.fixture
def stack(state: Path, flux_dev: Path) -> Iterator[RunningStack]:
    """A stack that other hosts may join."""
    KeyFolder(state / "keys").server()
    settings = ["--model", str(flux_dev), "--device", "cpu", "--checkpoint", "0"]
    with running_stack(state, *settings, "--listen-workers", "tcp://127.0.0.1:0") as running:
        yield running


def key_of(stack: RunningStack, folder: Path, name: str = "box") -> Path:
    return host_key(stack.folder, name, remote_endpoint(stack.folder), folder)


def on(client: Client, host: str = "box") -> list[WorkerView]:
    """The workers of a host that are loaded."""
    return [w for w in client.workers().workers if w.host == host and w.state != "loading"]


def runs(pid: int) -> bool:
    """Return whether a process runs; one that nobody has taken in, its parent having been killed, doesn't."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def host(client: Client, name: str = "box") -> HostView:
    return next(view for view in client.hosts() if view.name == name)


def wanted(stack: RunningStack) -> object:
    """The picture as the stack's own workers make it; then they have no denoiser any more."""
    picture = stack.picture(REQUEST.prompt, **REQUEST.model_dump(exclude_defaults=True, exclude={"prompt"}))[1]
    stack.client.scale("denoise", 0)
    return picture


def test_a_hosts_workers_make_the_same_pictures_and_die_and_come_back(stack: RunningStack, tmp_path: Path) -> None:
    client, picture = stack.client, wanted(stack)
    with joined_host(tmp_path / "box", key_of(stack, tmp_path)) as agent:
        patiently(lambda: len(on(client)) == 3)
        assert {worker.name for worker in on(client)} == {"text-1@box", "denoise-1@box", "vae-1@box"}
        jobs = client.submit_many([REQUEST] * 3, watch=True)
        for event in client.events([jobs[0].id], timeout=60):
            if event.state == "denoise" and event.step > 3:
                os.kill(next(w.pid for w in on(client) if w.stage == "denoise"), signal.SIGKILL)
                break
        for job in jobs:
            client.wait(job.id, 60)
            assert stack.pictures(job.id).equal(picture)
        told = {process.name: process for process in client.workers().processes}
        assert (told["denoise-1@box"].restarts, told["denoise-1@box"].reason) == (1, "killed by signal 9")
        assert "denoise-1@box" in (stack.folder / "logs" / "denoise-1@box.log").read_text()
        listed = triptych("hosts", folder=stack.folder)
        assert listed.stdout.split("\t")[:4] == ["box", "here", host(client).facts.hostname, "3 of 3"]
        stack.client.restart("vae")  # one after the other, wherever they are
        before = {worker.pid for worker in client.workers().workers if worker.stage == "vae"}
        patiently(lambda: len({w.pid for w in on(client) if w.stage == "vae"} - before) == 1, 60)
        agent.send_signal(signal.SIGINT)
        assert agent.wait(20) == 0
    patiently(lambda: host(client).state == "gone")
    assert not on(client)


@pytest.mark.all
def test_workers_end_with_their_agent_and_jobs_go_on_with_the_next_one(stack: RunningStack, tmp_path: Path) -> None:
    client, picture = stack.client, wanted(stack)
    key = key_of(stack, tmp_path)
    with joined_host(tmp_path / "box", key) as agent:
        patiently(lambda: len(on(client)) == 3)
        pids = [worker.pid for worker in on(client)]
        jobs = client.submit_many([REQUEST] * 2, watch=True)
        for event in client.events([jobs[0].id], timeout=60):
            if event.state == "denoise" and event.step > 3:
                break
        log = stack.folder / "logs" / "orchestrator.log"
        agent.kill()
        patiently(lambda: not any(map(runs, pids)))
        told = len(log.read_text())
    with joined_host(tmp_path / "box", key):  # whose first word tells that the others are no more
        for job in jobs:
            client.wait(job.id, 60)
            assert stack.pictures(job.id).equal(picture)
        assert "another agent" not in log.read_text()[told:]  # it has the folder of the first, and need not wait


@pytest.mark.all
def test_hosts_outlive_the_orchestrator_and_the_supervisor(state: Path, flux_dev: Path, tmp_path: Path) -> None:
    settings = ["--model", str(flux_dev), "--device", "cpu", "--listen-workers", "tcp://127.0.0.1:0"]
    KeyFolder(state / "keys").server()
    with running_stack(state, *settings) as stack:
        endpoint = remote_endpoint(state)
        with joined_host(tmp_path / "box", key_of(stack, tmp_path)) as agent:
            patiently(lambda: len(on(stack.client)) == 3)
            before = {worker.pid for worker in on(stack.client)}
            os.kill(stack.client.stack().pid, signal.SIGKILL)
            patiently(lambda: {worker.pid for worker in on(stack.client)} == before)
            patiently(lambda: host(stack.client).state == "here")
            stack.process.send_signal(signal.SIGINT)  # the stack ends, in good order
            stack.process.communicate(timeout=30)
            patiently(lambda: not any(map(runs, before)))
            assert agent.poll() is None
            stack.process = subprocess.Popen(["true"], text=True)  # it is over, and the next one is this machine's own
            stack.process.wait()
            with running_stack(state, *settings[:-1], endpoint) as again:
                patiently(lambda: len(on(again.client)) == 3, 60)


@pytest.mark.all
def test_a_host_is_cordoned_drained_and_resumed_and_that_outlives_the_orchestrator(
    stack: RunningStack, tmp_path: Path
) -> None:
    client, picture = stack.client, wanted(stack)
    with pytest.raises(NotFound):
        client.place_on_host("box", "drained")
    with joined_host(tmp_path / "box", key_of(stack, tmp_path)):
        patiently(lambda: len(on(client)) == 3)
        assert triptych("hosts", "cordon", "box", folder=stack.folder).returncode == 0
        job = client.submit(REQUEST)
        os.kill(client.stack().pid, signal.SIGKILL)
        patiently(lambda: len(on(client)) == 3)
        patiently(lambda: [view.placing for view in client.hosts()] == ["cordoned"])
        assert client.job(job.id).state == "queued"
        assert all(worker.job is None for worker in on(client))
        client.place_on_host("box", "")
        for event in client.events([job.id], timeout=60):
            if event.state == "denoise" and event.step > 3:
                break
        client.place_on_host("box", "drained")
        patiently(lambda: not on(client))
        assert client.job(job.id).state == "denoise"  # it waits where it was, nobody is to blame
        client.place_on_host("box", "")
        client.wait(job.id, 60)
        assert stack.pictures(job.id).equal(picture)
        assert not client.job(job.id).reasons


OTHER_TORCH = (
    "import orchestrator.supervisor.host_agent as agent; agent.library_versions = lambda: 'torch 2.12.0';"
    "from orchestrator.cli import main; main()"
)


def test_a_host_with_another_torch_is_refused_in_a_line(stack: RunningStack, tmp_path: Path) -> None:
    key = key_of(stack, tmp_path)
    with joined_host(tmp_path / "box", key, command=[sys.executable, "-c", OTHER_TORCH]) as agent:
        said = agent.communicate(timeout=60)[1].splitlines()
    assert agent.returncode == 2
    refusal = "Error: box has another version of the libraries (torch 2.12.0) than the stack's host"
    assert [line.startswith(refusal) for line in said if line.startswith("Error")] == [True]
    assert host(stack.client).state == "refused"
    assert "box is refused" in triptych("hosts", folder=stack.folder).stderr


@pytest.mark.all
def test_two_agents_with_one_key_are_one_host(stack: RunningStack, tmp_path: Path) -> None:
    """The second is heard once the first is gone; a key whose host is called as this one is refused."""
    key, client = key_of(stack, tmp_path), stack.client
    with joined_host(tmp_path / "one", key) as one:
        patiently(lambda: len(on(client)) == 3)
        first = {worker.pid for worker in on(client)}
        with joined_host(tmp_path / "two", key) as two:
            patiently(lambda: "another agent comes" in (stack.folder / "logs" / "orchestrator.log").read_text())
            assert {worker.pid for worker in on(client)} == first
            one.kill()
            patiently(lambda: len({worker.pid for worker in on(client)} - first) == 3, 60)
            assert two.poll() is None


def test_gpus_are_booked_by_host(state: Path, flux_dev: Path, tmp_path: Path) -> None:
    """GPU 0 of another host is not this one's: each has a budget, and what a lost host held is nobody's."""
    KeyFolder(state / "keys").server()
    config = tmp_path / "stack.toml"
    config.write_text(
        f'model = "{flux_dev}"\nlisten_workers = "tcp://127.0.0.1:0"\n'
        '[gpus]\n0 = "20MB"\n[stages]\ntext.device = "cpu:0"\ndenoise.device = "cpu:0"\nvae.device = "cpu:0"\n'
        '[hosts.box]\ngpus = {0 = "4MB"}\n[hosts.box.stages]\n'
        'text.device = "cpu:0"\ndenoise.device = "cpu:0"\nvae.device = "cpu:0"\n'
    )
    with running_stack(state, "--config", str(config)) as stack:
        client, picture = stack.client, wanted(stack)
        with joined_host(tmp_path / "box", key_of(stack, tmp_path)) as agent:
            patiently(lambda: len(on(client)) == 3)
            here, there = client.workers().gpus
            assert (here.index, here.budget, there.host, there.index, there.budget) == (
                0,
                20_000_000,
                "box",
                0,
                4_000_000,
            )
            jobs = client.submit_many([REQUEST] * 2, watch=True)
            for job in jobs:
                for _ in client.events([job.id], timeout=60):
                    held = sum(sum(worker.lease_bytes) for worker in on(client))
                    assert held <= there.budget
                assert stack.pictures(job.id).equal(picture)
            agent.send_signal(signal.SIGINT)
            agent.wait(20)
        patiently(lambda: [gpu.host for gpu in client.workers().gpus] == [here.host])


@pytest.mark.all
@pytest.mark.skipif(not FAKE_CLOCK, reason="needs libfaketime")
@pytest.mark.parametrize("apart", ["+1h", "-1h"])
def test_clocks_may_be_an_hour_apart(apart: str, stack: RunningStack, tmp_path: Path) -> None:
    client, picture = stack.client, wanted(stack)
    there = ["env", f"LD_PRELOAD={FAKE_CLOCK[0]}", f"FAKETIME={apart}", "FAKETIME_DONT_FAKE_MONOTONIC=1"]
    with joined_host(tmp_path / "box", key_of(stack, tmp_path), there=there):
        patiently(lambda: len(on(client)) == 3)
        denoiser = next(worker for worker in on(client) if worker.stage == "denoise")
        log = stack.folder / "logs" / "denoise-1@box.log"
        patiently(lambda: log.exists() and "\n" in log.read_text())
        told = datetime.fromisoformat(log.read_text().split()[0])  # by the host's clock
        assert abs(abs(told.timestamp() - time.time()) - 3600) < 120
        job = client.submit(REQUEST)
        for event in client.events([job.id], timeout=60):
            if event.state == "denoise" and event.step > 3:
                os.kill(denoiser.pid, signal.SIGKILL)
                break
        done = client.wait(job.id, 60)
        assert stack.pictures(job.id).equal(picture)
        assert done.finished is not None
        assert 0 <= done.finished - done.created < 60
        assert host(client).heard < 60
