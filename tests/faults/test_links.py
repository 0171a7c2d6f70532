"""A link that is cut and healed between two network namespaces, under TCP and CURVE."""

import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.access import KeyFolder
from protocol.client.client import Client
from protocol.curve_keys import KeyPair, PeerKey, save
from protocol.job import JobRequest
from scripts.faults.saboteur import patiently
from tests.stacks import TRIPTYCH, remote_endpoint, running_stack
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
    number = random.Random(os.getpid()).randrange(250)
    made = Link(f"10.213.{number}.1", f"tt{os.getpid() % 100000}", keeper.pid)
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


def denoisers(client: Client) -> list[str]:
    return [worker.state for worker in client.workers().workers if worker.stage == "denoise"]
