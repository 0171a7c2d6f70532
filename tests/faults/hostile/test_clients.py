"""Clients with keys that ask, watch, submit or leave unread more than they should: everybody else goes on."""

from pathlib import Path

import pytest

from protocol.client.client import Client, run
from protocol.curve_keys import load
from protocol.errors import QueueFull, TriptychError
from protocol.job import JobRequest
from protocol.messages.client import FetchPictures, GetJobs, Watch
from protocol.messages.common import Error
from protocol.messages.worker import Committed, Result
from protocol.tensors import Tensor
from scripts.faults.hostile import Peer
from tests.fakes import FakeWorker, Orchestrator
from tests.faults.hostile.peers import client_of, guarded, hostile, key_of, megabytes

MOST_MEGABYTES = 300


def ended_jobs(client: Client, count: int) -> None:
    jobs = client.submit_many([JobRequest(prompt=f"old {number}") for number in range(count)])
    client.cancel(*(job.id for job in jobs))


def picture_of(running: Orchestrator, client: Client) -> str:
    """A job that is done, with a picture of three megabytes."""
    job = client.submit("a cat", width=1024, height=1024)
    for stage in ("text", "denoise"):
        worker = running.worker(stage).ready()
        worker.finish(worker.take())
        worker.hear(Committed)
    vae = running.worker("vae").ready()
    task = vae.take()
    picture = Tensor("pictures", "uint8", (1, 1024, 1024, 3), bytes(3 << 20))
    vae.say(Result(job=task.job, stage="vae", attempt=task.attempt, seconds=0.1), picture)
    vae.hear(Committed)
    return job.id


def test_a_key_that_asks_without_end_leaves_the_others_their_answers(state: Path) -> None:
    with guarded(state, queue_limit=1000) as running:
        local, bob = running.client(), client_of(running, "bob")
        ended_jobs(local, 500)
        worker = running.worker("text")
        with hostile(running, "ask"), hostile(running, "ask", name="mallet"):
            for number in range(30):
                assert bob.submit(f"cat {number}").state == "queued"
                assert len(local.jobs(limit=250)) == 250
                worker.settle()
            assert local.stack().pid == running.process.pid
        assert "silent" not in running.log()


def test_who_does_not_read_its_pictures_costs_little_and_is_told_of(state: Path) -> None:
    with guarded(state) as running:
        local, bob = running.client(), client_of(running, "bob")
        mallory = client_of(running, "victim")
        picture_of(running, mallory)
        key, job = load(running.folder / "victim.key"), mallory.jobs()[0].id
        peers = [Peer(key, reads=False) for _ in range(4)]
        for _ in range(400):
            for peer in peers:
                assert peer.ask(FetchPictures, job=job)
        for number in range(20):
            assert bob.submit(f"cat {number}").state == "queued"
            assert mallory.pictures(job)[0].size == (1024, 1024)  # another connection of the same key
        assert megabytes(running.process) < MOST_MEGABYTES
        assert megabytes(running.doors["client"]) < MOST_MEGABYTES
        assert local.stack().pid == running.process.pid
        for peer in peers:
            peer.close()
        assert "doesn't read its answers" in running.log()


def test_watches_go_with_who_hangs_up_and_a_connection_has_no_more_than_it_may(state: Path) -> None:
    with guarded(state, queue_limit=10_000, client_jobs=10_000, client_rate=1000.0) as running:
        bob = client_of(running, "bob")
        with hostile(running, "watch"):
            for number in range(30):
                assert bob.submit(f"cat {number}").state == "queued"
        assert megabytes(running.process) < MOST_MEGABYTES
        jobs = bob.submit_many([JobRequest(prompt="x") for _ in range(5001)])
        with pytest.raises(QueueFull, match="watch at most 5000"):
            watch_all(bob, [job.id for job in jobs])
        bob.cancel(*(job.id for job in jobs))
        assert bob.stack().pid == running.process.pid


def watch_all(client: Client, jobs: list[str]) -> None:
    for start in range(0, len(jobs), 1000):
        run(client._link.ask(Watch, None, jobs=tuple(jobs[start : start + 1000])))


def test_who_queues_most_is_not_served_first(state: Path) -> None:
    """300 jobs of the highest priority from one key; one of another key's, and one of this machine's user."""
    with guarded(state, queue_limit=1000, client_jobs=1000, client_rate=1000.0) as running:
        mallory, bob, local = client_of(running, "mallory"), client_of(running, "bob"), running.client()
        mallory.submit_many([JobRequest(prompt=f"x {number}", priority=1000) for number in range(300)])
        theirs = {bob.submit("a cat").number, local.submit("a dog").number}
        worker = running.worker("text").ready()
        served = []
        for _ in range(4):
            task = worker.take()
            served.append(local.job(task.job).number)
            worker.finish(task)
            worker.hear(Committed)
            worker.ready()
        assert theirs <= {*served}


def test_nobody_learns_from_a_prompt_or_a_picture_what_another_key_has(state: Path) -> None:
    with guarded(state) as running:
        alice, bob, local = client_of(running, "alice"), client_of(running, "bob"), running.client()
        worker = running.worker("text").ready()

        def encode(client: Client, prompt: str) -> bool:
            job = client.submit(prompt, seed=1)
            if not (cached := client.job(job.id).cached):
                finish(worker)
            return cached

        assert not encode(alice, "a secret cat")
        assert encode(alice, "a secret cat")
        assert not encode(bob, "a secret cat")
        assert not encode(local, "a secret cat")


def test_the_stacks_owner_may_let_keys_share_what_is_encoded(state: Path) -> None:
    with guarded(state, share_cache=True) as running:
        alice, bob = client_of(running, "alice"), client_of(running, "bob")
        worker = running.worker("text").ready()
        alice.submit("a cat", seed=1)
        finish(worker)
        assert bob.job(bob.submit("a cat", seed=2).id).cached


def finish(worker: FakeWorker) -> None:
    worker.finish(worker.take())
    worker.hear(Committed)
    worker.ready()


def test_a_message_of_more_parts_than_any_has_is_let_go(state: Path) -> None:
    with guarded(state) as running:
        bob = client_of(running, "bob")
        before = megabytes(running.process)
        peer = Peer(key_of(running, "mallory"))
        assert peer.send([bytes(1 << 20)] * 400)
        for number in range(10):
            assert bob.submit(f"cat {number}").state == "queued"
        assert peer.hear(100) is None
        peer.close()
        assert megabytes(running.process) < before + 50
        with pytest.raises(TriptychError):
            client_of(running, "nobody", timeout=1).job("none")


@pytest.mark.all
def test_a_key_whose_questions_are_let_go_is_told_so(state: Path) -> None:
    """Its share of the core is used up, and as many wait as may."""
    with guarded(state, queue_limit=1000) as running:
        mallory, bob = client_of(running, "mallory"), client_of(running, "bob")
        ended_jobs(mallory, 500)
        peer = Peer(load(running.folder / "mallory.key"))
        answers: list[object] = []
        while not any(isinstance(answer, Error) and answer.code == "queue_full" for answer in answers):
            peer.ask(GetJobs, limit=100)
            while peer.socket.poll(0):
                answers.append(peer.answer())
        assert bob.submit("a cat").state == "queued"
        peer.close()
