"""Doors: what breaks one, or fills it, ends its own connections, and nobody loses what was accepted."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from orchestrator.access import KeyFolder
from orchestrator.doors.door import MOST_CONNECTIONS, OWN_FILES
from protocol.client.client import Client
from protocol.curve_keys import Role, save
from protocol.job import JobRequest
from protocol.messages.common import Error
from protocol.messages.worker import Committed, Task
from scripts.faults.hostile import Peer
from scripts.faults.hostile_peers import free_port
from scripts.faults.saboteur import patiently
from tests.fakes import FakeWorker, Orchestrator, orchestrator
from tests.faults.hostile.peers import client_of, guarded, hostile, key_of, megabytes
from tests.stacks import running_stack

FEW_LINES = 20


def kept_open(running: Orchestrator, role: Role = "client") -> "contextlib.AbstractContextManager[None]":
    """Start a role's door anew whenever it ends, as the supervisor does."""

    @contextlib.contextmanager
    def keeping() -> Iterator[None]:
        over = threading.Event()

        def keep() -> None:
            while not over.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.doors[role].wait(0.05)
                    if not over.is_set():
                        running.open_door(role)

        keeper = threading.Thread(target=keep)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()

    return keeping()


@pytest.mark.parametrize("role", [pytest.param("client", marks=pytest.mark.all), "worker"])
def test_a_door_that_is_killed_costs_nobody_anything(state: Path, role: Role) -> None:
    """A client that waits and a worker that works behind doors; the door of one is killed, again and again."""
    with guarded(state) as running:
        alice = client_of(running, "alice")
        worker = running.worker("text", key=key_of(running, "box", "worker")).ready()
        endpoints = dict(running.remote)
        job = alice.submit("a cat")
        task = worker.take()
        for _ in range(3):
            running.doors[role].send_signal(signal.SIGKILL)
            running.doors[role].wait()
            running.open_door(role)
            assert alice.submit(f"a dog {role}").state == "queued"
            if role == "client":
                worker.say_beat()
        if role == "worker":
            worker = returned(running, worker, task)
        worker.finish(task)
        worker.hear(Committed)
        assert alice.job(job.id).records[0].stage == "text"
        assert running.remote == endpoints
        local = running.client()
        assert local.stack().pid == running.process.pid
        assert all(job.reasons == () for job in local.jobs())


def returned(running: Orchestrator, worker: FakeWorker, task: Task) -> FakeWorker:
    """A worker whose link was cut says hello anew when it is told that it is unknown, and goes on with its task."""
    while True:
        worker.say_beat()
        if worker.socket.poll(500) and isinstance(worker.hear_any(), Error):
            break
    back = running.worker("text", key=worker.key, pid=worker.pid)
    return back.ready(current_task=(task.job, task.stage, task.attempt))


def test_strangers_cost_a_few_lines_of_a_log_and_nobody_their_answers(state: Path) -> None:
    with guarded(state) as running:
        bob = client_of(running, "bob")
        with hostile(running, "strangers"), hostile(running, "strangers", name="mallet"):
            while "was not let in" not in running.door_log():
                bob.stack()
            for number in range(40):
                assert bob.submit(f"cat {number}").state == "queued"
        assert len(running.door_log().splitlines()) < FEW_LINES
        assert len(running.log().splitlines()) < FEW_LINES


@pytest.mark.all
def test_connections_are_capped_below_the_file_limit_and_local_users_unharmed(state: Path) -> None:
    with guarded(state) as running:
        local = running.client()
        before = running.doors["client"].pid
        with hostile(running, "connections"):
            _, files = resource.prlimit(running.doors["client"].pid, resource.RLIMIT_NOFILE)
            most = min(MOST_CONNECTIONS["client"], (files - OWN_FILES) // 3)
            while f"{most} connections are open" not in running.door_log():
                assert local.stack().pid == running.process.pid
            assert client_of(running, "bob").submit("a cat").state == "queued"  # while it goes on
        assert running.doors["client"].pid == before
        assert running.doors["client"].poll() is None


def test_a_door_with_few_files_takes_fewer_connections(state: Path) -> None:
    most = 3 * OWN_FILES
    with guarded(state) as running:
        running.doors["client"].kill()
        running.doors["client"].wait()
        running.open_door("client", ["bash", "-c", f'ulimit -n {most}; exec "$@"', "door"])
        with hostile(running, "connections"):
            while f"{(most - OWN_FILES) // 3} connections are open" not in running.door_log():
                assert running.client().stack().pid == running.process.pid
        assert client_of(running, "bob").submit("a cat").state == "queued"


@pytest.mark.all
def test_a_message_larger_than_a_doors_memory_ends_at_most_that_door(state: Path) -> None:
    with guarded(state) as running, kept_open(running):
        bob = client_of(running, "bob", timeout=60)
        before = megabytes(running.process)
        with hostile(running, "parts"):
            jobs = [bob.submit_many([JobRequest(prompt=f"cat {n}")], timeout=60)[0] for n in range(40)]
            assert bob.stack().pid == running.process.pid
        assert megabytes(running.process) < before + 50
        assert {job.id for job in bob.jobs()} == {job.id for job in jobs}


def test_without_keys_a_door_listens_on_the_loopback_address_alone(state: Path) -> None:
    with orchestrator(state, listen="tcp://127.0.0.1:0") as running:
        assert running.remote["client"].startswith("tcp://127.0.0.1:")
        running.worker("text")
        with Client(endpoint=running.remote["client"]) as client:
            assert client.submit("a cat").state == "queued"


def test_a_key_that_takes_every_place_of_a_door_keeps_nobody_out(state: Path) -> None:
    """Connections that are let in, and stay: the oldest give way to those that come."""
    most = 20
    with guarded(state) as running:
        running.doors["client"].kill()
        running.doors["client"].wait()
        running.open_door("client", ["bash", "-c", f'ulimit -n {OWN_FILES + 3 * most}; exec "$@"', "door"])
        key = key_of(running, "mallory")
        held = [Peer(key) for _ in range(most + 5)]
        for peer in held[:most]:
            assert peer.socket.poll(10_000, zmq.POLLOUT)  # it is let in
        bob = client_of(running, "bob")
        for number in range(5):
            assert bob.submit(f"cat {number}").state == "queued"
        for peer in held:
            peer.close()


def test_a_door_that_dies_again_and_again_does_not_end_its_stack(state: Path) -> None:
    """The whole stack, with its supervisor: what breaks a door costs its peers a moment, however often."""
    KeyFolder(state / "keys").server()
    options = ["--model", "demo", "--device", "cpu", "--listen", f"tcp://127.0.0.1:{free_port()}"]
    with running_stack(state, *options) as stack:
        patiently(lambda: published_remote(state))
        endpoint = published_remote(state)["client"]
        save(state / "alice.key", KeyFolder(state / "keys").issue("alice", "client", endpoint))
        with Client(state / "alice.key", timeout=30) as alice:
            for number in range(6):  # more often than a process that never worked may end
                before = door_of(stack.client)
                assert alice.submit(f"a red circle {number}", steps=1).state == "queued"
                os.kill(before, signal.SIGABRT)
                patiently(lambda before=before: door_of(stack.client) not in (0, before))
            assert [alice.wait(job.id, 60).state for job in alice.jobs()] == ["done"] * 6
        assert published_remote(state)["client"] == endpoint
        assert stack.process.poll() is None


def published_remote(state: Path) -> dict[str, str]:
    return dict(json.loads((state / "stack.json").read_text())["remote"])


def door_of(client: Client) -> int:
    return next(process.pid or 0 for process in client.workers().processes if process.name == "door-client")
