#!/usr/bin/env python
"""Peers that mean no good, each with a key of its own or none; for tests/faults/hostile, the soak, and the bench.

    python -m scripts.faults.hostile ask alice.key --seconds 10

Runs until it is told to stop, or for so many seconds, and prints one line: what it has done.
"""

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click
import zmq

from protocol import wire
from protocol.curve_keys import KeyPair, PeerKey, load
from protocol.job import JobRequest
from protocol.messages.client import Cancel, FetchPictures, GetJobs, Submit, Watch
from protocol.messages.common import Heartbeat, Message
from protocol.messages.worker import Progress, Ready, Task, WorkerHello
from protocol.model import ModelDescription
from protocol.sockets import new_identity, receive

Deeds = Iterator[int]  # each step tells how many things it has done
POLL_MS = 5_000


class Peer:
    """A connection; it reads only what it is told to."""

    def __init__(self, key: PeerKey, reads: bool = True) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        for option, value in {zmq.RCVHWM: 2000 if reads else 1, zmq.LINGER: 0, zmq.IMMEDIATE: 1}.items():
            self.socket.setsockopt(option, value)
        self.socket.setsockopt(zmq.IDENTITY, new_identity())
        for text, part in {zmq.CURVE_SERVERKEY: key.server, zmq.CURVE_PUBLICKEY: key.public}.items():
            self.socket.setsockopt_string(text, part)
        self.socket.setsockopt_string(zmq.CURVE_SECRETKEY, key.secret)
        self.socket.connect(key.endpoint)
        self._numbers = iter(range(1, 1 << 40))

    def ask(self, cls: type, **fields: object) -> bool:
        """Ask, if the link takes it."""
        return self.send(wire.encode(cls(request=next(self._numbers), **fields)))

    def send(self, frames: list) -> bool:  # type: ignore[type-arg]
        if not self.socket.poll(POLL_MS, zmq.POLLOUT):
            return False
        self.socket.send_multipart(frames)
        return True

    def hear(self, milliseconds: int = POLL_MS) -> wire.Envelope | None:
        return wire.decode(receive(self.socket)) if self.socket.poll(milliseconds) else None

    def answer(self) -> Message | None:
        heard = self.hear()
        return heard.message if heard else None

    def close(self) -> None:
        self.socket.close(linger=0)
        self._context.term()


def ask(key: PeerKey) -> Deeds:
    """Ask for as many jobs as one may, of 500 that have ended, 250 times a second, and read what comes."""
    peer, jobs = Peer(key), tuple(f"a{secrets.token_hex(6)}" for _ in range(500))
    peer.ask(Submit, jobs=tuple(JobRequest(prompt="x", id=job) for job in jobs))
    peer.answer()
    peer.ask(Cancel, jobs=jobs)
    while True:
        peer.ask(GetJobs, limit=100)
        while peer.socket.poll(0):
            peer.socket.recv_multipart()
        time.sleep(0.004)
        yield 1


def unread(key: PeerKey) -> Deeds:
    """Ask for pictures over four connections, and read none."""
    asker, job = Peer(key), f"u{secrets.token_hex(6)}"
    asker.ask(Submit, jobs=(JobRequest(prompt="a red circle", width=256, height=256, steps=1, num_images=8, id=job),))
    while not any(found.state == "done" for found in getattr(asker.answer(), "jobs", ())):
        time.sleep(0.1)
        asker.ask(GetJobs, jobs=(job,))
    peers = [Peer(key, reads=False) for _ in range(4)]
    while True:
        for peer in peers:
            peer.ask(FetchPictures, job=job)
        time.sleep(0.001)
        yield len(peers)


def watch(key: PeerKey) -> Deeds:
    """Watch 500 jobs with each of ever new connections, which hang up."""
    asker = Peer(key)
    jobs = tuple(f"w{secrets.token_hex(6)}" for _ in range(500))
    asker.ask(Submit, jobs=tuple(JobRequest(prompt="x", id=job) for job in jobs))
    asker.hear()
    while True:
        peer = Peer(key)
        peer.ask(Watch, jobs=jobs)
        peer.hear(1000)
        peer.close()
        yield 1


def parts(key: PeerKey) -> Deeds:
    """Send messages of 3,000 parts of a megabyte."""
    megabyte = secrets.token_bytes(1 << 20)
    while True:
        peer = Peer(key)
        peer.send([megabyte] * 3000)
        time.sleep(5)
        peer.close()
        yield 1


def strangers(key: PeerKey) -> Deeds:
    """Knock with keys that nobody knows, as often as can be."""
    while True:
        pair = KeyPair.new()
        peer = Peer(PeerKey("eve", key.role, key.endpoint, key.server, pair.public, pair.secret))
        peer.socket.poll(5, zmq.POLLOUT)
        peer.close()
        yield 1


def connections(key: PeerKey) -> Deeds:
    """Open TCP connections and say nothing."""
    address = urlsplit(key.endpoint)
    held: list[socket.socket] = []
    while True:
        try:
            held.append(socket.create_connection((address.hostname, address.port), timeout=1))
        except OSError:
            held = held[100:]
            time.sleep(0.1)
        yield 1


def flood(key: PeerKey) -> Deeds:
    """Queue jobs of the highest priority, as many as may be."""
    peer = Peer(key)
    while True:
        peer.ask(Submit, jobs=tuple(JobRequest(prompt=f"x {n}", priority=1000) for n in range(50)))
        peer.hear(1000)
        time.sleep(0.05)
        yield 50


def vanish(key: PeerKey, model: ModelDescription) -> Deeds:
    """Be a worker that poses as another, takes tasks, tells of endless steps, and is gone with them."""
    while True:
        peer = Peer(key)
        hello = WorkerHello(
            name="denoise-1", stage="denoise", pid=1, host=socket.gethostname(), device="cpu", dtype="float32",
            model=model, gpus=(0,),
        )  # fmt: skip
        peer.send(wire.encode(hello))
        peer.send(wire.encode(Ready(context_bytes=(1 << 50,))))
        heard = peer.hear(200)
        while heard and not isinstance(heard.message, Task):
            heard = peer.hear(200)
        if heard and isinstance(task := heard.message, Task):
            for step in range(200):
                peer.send(
                    wire.encode(Progress(job=task.job, stage=task.stage, attempt=task.attempt, step=step, steps=1))
                )
            peer.send(wire.encode(Heartbeat(rss_bytes=1, gpu_bytes=1)))
        peer.close()
        yield 1


DEEDS: dict[str, Callable[[PeerKey], Deeds]] = {
    deed.__name__: deed for deed in (ask, unread, watch, parts, strangers, connections, flood)
}


@click.command()
@click.argument("deed", type=click.Choice([*DEEDS, "vanish"]))
@click.argument("key", type=click.Path(path_type=Path, exists=True))
@click.option("--seconds", type=float, default=3600.0, show_default=True)
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="JSON of a model's description.")
def main(deed: str, key: Path, seconds: float, model: Path | None) -> None:
    """Do what one should not."""
    done, until = 0, time.monotonic() + seconds
    peer = load(key)
    deeds = vanish(peer, ModelDescription.model_validate_json(model.read_text())) if model else DEEDS[deed](peer)
    for count in deeds:
        done += count
        if time.monotonic() > until:
            break
    print(json.dumps({"deed": deed, "times": done}))


if __name__ == "__main__":
    main()
