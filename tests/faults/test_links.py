"""A link that is cut and healed between two network namespaces, under TCP and CURVE."""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from orchestrator.access import KeyFolder
from orchestrator.doors import front
from protocol import sockets
from protocol.client.client import Client
from protocol.curve_keys import KeyPair, PeerKey, save
from protocol.job import JobRequest
from scripts.faults.saboteur import patiently
from tests.stacks import TRIPTYCH, published, remote_endpoint, running_stack
from tests.tiny import environment


@dataclass
class Link:
    """Between this machine and another network; `near` is our address."""

    near: str
    device: str
    keeper: int  # process that holds the other network open

    def cut(self) -> None:
        ip("link", "set", self.device, "down")

    def heal(self) -> None:
        ip("link", "set", self.device, "up")

    def there(self, command: list[str]) -> list[str]:
        """A command that runs at the other end."""
        return ["nsenter", "-t", str(self.keeper), "-n", *command]


def ip(*arguments: str, there: list[str] | None = None) -> None:
    subprocess.run([*(there or []), "ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def link() -> Iterator[Link]:
    keeper = subprocess.Popen(["unshare", "-n", "sleep", "600"], stderr=subprocess.DEVNULL)
    number = secrets.randbelow(250)
    made = Link(f"10.213.{number}.1", f"tt{secrets.token_hex(4)}", keeper.pid)
    there = made.there([])
    try:
        try:
            patiently(lambda: os.readlink(f"/proc/{keeper.pid}/ns/net") != os.readlink("/proc/self/ns/net"), 5)
            ip("link", "add", made.device, "type", "veth", "peer", "name", "far", "netns", str(keeper.pid))
            ip("addr", "add", f"{made.near}/24", "dev", made.device)
            ip("addr", "add", f"10.213.{number}.2/24", "dev", "far", there=there)
            ip("link", "set", "far", "up", there=there)
            made.heal()
        except (AssertionError, subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"only root may make networks: {error}")
        yield made
    finally:
        keeper.kill()
        keeper.wait()


def test_a_link_that_is_cut_and_healed_costs_no_job_and_no_bit(link: Link, state: Path, flux_dev: Path) -> None:
    pair = KeyPair.new()
    folder = KeyFolder(state / "keys")
    folder.server()
    folder.add("box", "worker", pair.public)
    model = ["--model", str(flux_dev), "--device", "cpu"]
    request = JobRequest(prompt="a red star", seed=1, steps=60, width=32, height=32)
    with (
        tempfile.TemporaryDirectory(prefix="tt-") as keys,
        running_stack(state, *model, "--checkpoint", "0", "--listen-workers", f"tcp://{link.near}:0") as stack,
    ):
        wanted = stack.picture(request.prompt, **request.model_dump(exclude_defaults=True, exclude={"prompt"}))[1]
        stack.client.scale("denoise", 0)
        patiently(lambda: not denoisers(stack.client))
        key = Path(keys) / "box.key"
        endpoint = remote_endpoint(state)
        save(key, PeerKey("box", "worker", endpoint, folder.server().public, pair.public, pair.secret))
        worker = subprocess.Popen(
            link.there([*TRIPTYCH, "worker", "denoise", "--state", str(key), "--checkpoint", "0", *model]),
            env=environment(), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            patiently(lambda: "idle" in denoisers(stack.client))
            jobs = stack.client.submit_many([request] * 3, watch=True)
            for event in stack.client.events([jobs[0].id], timeout=60):
                if event.state == "denoise" and event.running:
                    link.cut()
                    break
            patiently(lambda: not denoisers(stack.client))  # it was missed
            link.heal()
            for job in jobs:
                stack.client.wait(job.id, 60)
                assert stack.pictures(job.id).equal(wanted)
            assert denoisers(stack.client) == ["idle"]
        finally:
            worker.terminate()
            assert worker.wait(20) == 0


ASKING = """
import sys
from triptych import Client
with Client(sys.argv[1], timeout=60) as client:
    for _ in sys.stdin:
        print(client.stack().pid, flush=True)
"""


@pytest.mark.parametrize("seconds", [pytest.param(2, marks=pytest.mark.all), pytest.param(3, marks=pytest.mark.all), 5])
def test_a_client_is_answered_again_after_a_cut_and_a_door_forgets_who_is_gone(
    link: Link, state: Path, tmp_path: Path, seconds: int
) -> None:
    keys = KeyFolder(state / "keys")
    keys.server()
    with running_stack(state, "--model", "demo", "--device", "cpu", "--listen", f"tcp://{link.near}:0") as stack:
        key = tmp_path / "alice.key"
        save(key, keys.issue("alice", "client", published(state, "client")))
        asking = subprocess.Popen(
            link.there([sys.executable, "-c", ASKING, str(key)]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        assert asking.stdin
        assert asking.stdout
        try:

            def ask() -> None:
                assert asking.stdin
                print(file=asking.stdin, flush=True)

            ask()
            assert int(asking.stdout.readline()) == stack.client.stack().pid
            link.cut()
            ask()
            subprocess.run(["sleep", str(seconds)], check=True)  # as long as the link is to be down
            link.heal()
            assert int(asking.stdout.readline()) == stack.client.stack().pid
            (door,) = (p.pid for p in stack.client.workers().processes if p.name == "door-client")
            assert connections(door)
            link.cut()
            patiently(lambda: not connections(door), 30)
        finally:
            asking.kill()
            asking.wait()
            asking.stdin.close()
            asking.stdout.close()


def test_a_door_gives_a_connection_up_before_its_peer_does() -> None:
    assert front.UNTAKEN_MS < sockets.UNTAKEN_MS


def connections(pid: int) -> list[object]:
    """Return the TCP connections of a process that are open."""
    return [one for one in psutil.Process(pid).net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED]


def denoisers(client: Client) -> list[str]:
    return [worker.state for worker in client.workers().workers if worker.stage == "denoise"]
