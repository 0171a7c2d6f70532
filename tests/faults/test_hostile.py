"""Peers that send valid messages in any order, and bytes that are none, before and after they said who they are."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from protocol import wire
from protocol.messages.client import FROM_CLIENT, CollectGarbage, Drain
from protocol.messages.common import Message
from protocol.messages.worker import FROM_WORKER, WorkerHello
from tests.chance import examples
from tests.fakes import MODEL, Orchestrator, orchestrator, raw_dealer
from tests.protocol.strategies import messages, tensors

Frames = list[bytes]


def framed(kinds: tuple[type[Message], ...]) -> st.SearchStrategy[Frames]:
    """Valid messages with tensors beside them; some with a byte changed."""

    def encode(message: Message, beside: list[object], damage: int | None) -> Frames:
        frames = [bytes(frame) for frame in wire.encode(message, beside)]
        if damage is not None:
            at = damage % max(1, len(frames[1]))
            frames[1] = frames[1][:at] + bytes([frames[1][at] ^ (1 + damage % 255)]) + frames[1][at + 1 :]
        return frames

    damage = st.none() | st.integers(0, 10**6)
    return st.one_of(*(st.builds(encode, messages(kind), st.lists(tensors(), max_size=2), damage) for kind in kinds))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="tt-") as folder, orchestrator(Path(folder)) as started:
        started.worker("text").ready()
        yield started


def alive(running: Orchestrator) -> bool:
    """It answers, and has not died and come back."""
    client = running.client()
    answered = client.stack().pid == running.process.pid
    client.close()
    running._opened.remove(client)
    return answered


def send(endpoint: str, conversation: list[Frames]) -> None:
    context, peer = raw_dealer(endpoint)
    for frames in conversation:
        peer.send_multipart(frames)
    peer.setsockopt(zmq.LINGER, 2000)
    peer.close()
    context.term()


hello = WorkerHello(name="fuzz", stage="denoise", pid=77, host="elsewhere", device="x", dtype="float32", model=MODEL)
SAFE = tuple(kind for kind in FROM_CLIENT if kind not in (Drain, CollectGarbage))  # those do what they say


@examples(60)
@given(conversation=st.lists(framed(tuple(kind for kind in FROM_WORKER if kind is not WorkerHello)), max_size=12))
def test_a_worker_that_says_anything_after_its_hello(running: Orchestrator, conversation: list[Frames]) -> None:
    send(running.endpoints.workers, [[bytes(frame) for frame in wire.encode(hello)], *conversation])
    assert alive(running)


@examples(40)
@given(conversation=st.lists(framed(FROM_WORKER), max_size=8))
def test_a_worker_that_says_anything_before_it(running: Orchestrator, conversation: list[Frames]) -> None:
    send(running.endpoints.workers, conversation)
    assert alive(running)


@examples(60)
@given(conversation=st.lists(framed(SAFE), max_size=12))
def test_a_client_that_asks_anything(running: Orchestrator, conversation: list[Frames]) -> None:
    send(running.endpoints.clients, conversation)
    assert alive(running)


@examples(40)
@given(conversation=st.lists(st.lists(st.binary(max_size=200), min_size=1, max_size=5), max_size=20))
def test_bytes_that_are_no_message(running: Orchestrator, conversation: list[Frames]) -> None:
    for endpoint in (running.endpoints.clients, running.endpoints.workers):
        send(endpoint, conversation)
    assert alive(running)


def test_work_goes_on_among_hostile_peers(state: Path) -> None:
    """Jobs are done while others shout."""
    rng = random.Random(3)
    with orchestrator(state) as running:
        stages = [running.worker(stage).ready() for stage in ("text", "denoise", "vae")]
        client = running.client()
        for number in range(5):
            for endpoint in (running.endpoints.clients, running.endpoints.workers):
                send(endpoint, [[rng.randbytes(rng.randrange(300)) for _ in range(3)] for _ in range(100)])
            job = client.submit(f"cat {number}")
            for worker in stages:
                worker.finish(worker.take())
                worker.ready()
            assert client.wait(job.id, 30).state == "done"
