"""Every process killed, and stopped, at every transition of a job: nothing is lost, and the bits stay."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.client.client import Client
from protocol.job import JobRequest
from scripts.faults.saboteur import Saboteur, Stack, leftovers
from tests.stacks import logs

TRANSITIONS = [("text", True), ("denoise", True), ("vae", True)]
REQUEST = JobRequest(prompt="a star", width=32, height=32, steps=40, seed=5)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, flux_dev: Path) -> Iterator[Stack]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="tt-") as folder:
        running = Stack(Path(folder), ["--model", str(flux_dev), "--device", "cpu", "--checkpoint", "0"])
        running.wait_ready()
        yield running
        assert running.stop() == 0, logs(running.state)
        assert running.orphans() == []
        assert leftovers(running.state) == []


@pytest.fixture(scope="module")
def wanted(stack: Stack) -> bytes:
    """The picture of an undisturbed stack."""
    with Client(stack.state, timeout=30) as client:
        return pictures(client, client.wait(client.submit(REQUEST).id, 60).id)


def pictures(client: Client, job: str) -> bytes:
    return bytes(client.raw_pictures(job)[1].data)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param("text-1", signal.SIGKILL),
        pytest.param("denoise-1", signal.SIGKILL),
        pytest.param("vae-1", signal.SIGKILL),
        pytest.param("orchestrator", signal.SIGKILL),
        pytest.param("denoise-1", signal.SIGSTOP),
        pytest.param("text-1", signal.SIGSTOP, marks=pytest.mark.all),
        pytest.param("vae-1", signal.SIGSTOP, marks=pytest.mark.all),
        pytest.param("orchestrator", signal.SIGSTOP, marks=pytest.mark.all),
    ],
)
def test_a_process_at_every_transition(name: str, number: signal.Signals, stack: Stack, wanted: bytes) -> None:
    saboteur = Saboteur(stack, random.Random(0))
    for index, moment in enumerate(TRANSITIONS):
        stack.remember()
        # Another prompt each time, or its embeddings are known and the first stage is skipped; its picture is not.
        fresh = REQUEST.model_copy(
            update={"prompt": f"a star {name} {number} {index}", "id": f"{name}-{number}-{index}"}
        )
        same = REQUEST.model_copy(update={"id": f"same-{name}-{number}-{index}"})
        with Client(stack.state, timeout=30) as client:
            jobs = client.submit_many([fresh, same], watch=True)
            hit = False
            for event in client.events([job.id for job in jobs], timeout=120):
                if not hit and (event.state, event.running) == moment:
                    saboteur.signal(name, number)
                    hit = True
            assert hit, f"{moment} never came"
            done = [client.wait(job.id, 60) for job in jobs]
            assert [len(job.records) for job in done] == [3, 3]
            assert pictures(client, same.id or "") == wanted
            again = client.wait(client.submit(fresh.model_copy(update={"id": None})).id, 60)
            assert pictures(client, again.id) == pictures(client, fresh.id or "")
    saboteur.close()


def test_the_supervisor_killed_in_mid_run_and_started_again(stack: Stack, wanted: bytes) -> None:
    saboteur = Saboteur(stack, random.Random(0))
    stack.remember()
    with Client(stack.state, timeout=30) as client:
        jobs = client.submit_many([REQUEST] * 6)
        for event in client.events([jobs[1].id], timeout=60):
            if event.state == "denoise" and event.running:
                break
    saboteur.end_supervisor()
    saboteur.close()
    with Client(stack.state, timeout=30) as client:
        for job in jobs:
            client.wait(job.id, 60)
            assert pictures(client, job.id) == wanted
