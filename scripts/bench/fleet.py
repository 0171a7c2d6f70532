"""Measure what many workers cost the orchestrator: hosts with agents, whose workers do nothing, over TCP and CURVE.

    python -m scripts.bench.fleet --hosts 125 --each 8 --jobs 20000 --queued 100000

Three rows, as JSON lines: what they cost while there is nothing to do; jobs a second through three stages, and the
seconds of a decision, by the orchestrator's own metrics; the same with so many jobs queued from the start. The
orchestrator, its door and the hosts share this machine's cores: `of a core` counts the orchestrator's own time.
"""

import contextlib
import json
import os
import socket as socket_module
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgpack
import psutil
import zmq

from orchestrator.access import KeyFolder
from orchestrator.settings import DoorSpec, OrchestratorSettings, OrchestratorSpec
from orchestrator.version import VERSION
from protocol import wire
from protocol.client.client import Client
from protocol.client.endpoints import PUBLISHED
from protocol.curve_keys import load, save
from protocol.host import HostFacts, library_versions
from protocol.job import JobRequest
from protocol.messages.common import Heartbeat
from protocol.messages.host import HostHello, HostStatus
from protocol.messages.supervisor import TO_SUPERVISOR, HostJoined, HostPlanned, SupervisorHello
from protocol.messages.worker import Ready, WorkerHello
from protocol.sockets import dealer, new_identity, receive
from protocol.stages import USUAL_NEXT, Stage
from protocol.tensors import Buffer
from scripts.bench.stack import MODEL, OUTPUTS

LOCAL_PIDS = 10_000_000  # of no process
FEEDERS = 2  # processes that play hosts
STAGES_OF_EACH: tuple[Stage, ...] = ("denoise", "text", "vae")
JOIN_SECONDS = 300.0
IDLE_SECONDS = 20.0


class NullHost:
    """A host's agent, and its workers, which answer tasks at once."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", where: str, each: int, number: int) -> None:
        key = None if where.startswith("ipc:") else load(Path(where))
        endpoint, name = (key.endpoint, key.name) if key else (where, socket_module.gethostname())
        self.agent = dealer(context, endpoint, new_identity(), key) if key else None
        self.workers: dict[zmq.Socket[bytes], Stage] = {}
        pids = range(2, each + 2) if key else range(LOCAL_PIDS + number * each, LOCAL_PIDS + (number + 1) * each)
        if self.agent:
            facts = HostFacts(
                hostname=name, version=VERSION, versions=library_versions(), memory_bytes=1 << 35, cores=8
            )
            say(self.agent, wire.encode(HostHello(facts=facts, pid=1, pids=tuple(pids))))
        for index in range(each):
            stage = STAGES_OF_EACH[(number * each + index) % 8 if (number * each + index) % 8 < 3 else 0]
            socket = dealer(context, endpoint, new_identity(), key)
            hello = WorkerHello(name=f"{stage}-{index}@{name}", stage=stage, pid=pids[index], host=name,
                                device="none", dtype="float32", model=MODEL)  # fmt: skip
            for message in (hello, Ready()):
                say(socket, wire.encode(message))
            self.workers[socket] = stage

    @property
    def sockets(self) -> "list[zmq.Socket[bytes]]":
        return [*([self.agent] if self.agent else []), *self.workers]


def say(socket: "zmq.Socket[bytes]", frames: Sequence[Buffer]) -> None:
    """Send once there is a connection, for which the first message may have to wait."""
    assert socket.poll(60_000, zmq.POLLOUT), "a connection was lost"
    socket.send_multipart(frames)


READY = wire.encode(Ready())
BEAT = wire.encode(Heartbeat(rss_bytes=0, gpu_bytes=0))
STATUS = wire.encode(HostStatus())


def play(keys: list[str], each: int, first: int) -> None:
    """Play hosts, until killed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, len(keys) * (each + 1) + 64)
    hosts = [NullHost(context, key, each, first + number) for number, key in enumerate(keys)]
    stage_of = {socket: stage for host in hosts for socket, stage in host.workers.items()}
    poller = zmq.Poller()
    for host in hosts:
        for socket in host.sockets:
            poller.register(socket, zmq.POLLIN)
    beaten, beat_seconds, told = time.monotonic(), 1.0, time.monotonic()
    while True:
        for socket, _ in poller.poll(100):
            frames = socket.recv_multipart()
            if frames[0] == b"\x01task":
                answer(socket, stage_of[socket], frames)
            elif frames[0] == b"\x01welcome" and socket in stage_of:
                beat_seconds = msgpack.unpackb(frames[1])["fields"]["heartbeat_seconds"]
        now = time.monotonic()
        if now - told >= 1.0:
            told = now
            for host in hosts:
                if host.agent:
                    say(host.agent, STATUS)
        if now - beaten >= beat_seconds:
            beaten = now
            for socket in stage_of:
                say(socket, BEAT)


def answer(socket: "zmq.Socket[bytes]", stage: Stage, frames: list[bytes]) -> None:
    task, output = msgpack.unpackb(frames[1])["fields"], OUTPUTS[stage]
    fields = {name: task[name] for name in ("job", "stage", "attempt")}
    fields |= {"seconds": 0.0, "next": USUAL_NEXT[stage]}
    header = msgpack.packb({"fields": fields, "tensors": [output.spec]})
    say(socket, [b"\x01result", header, output.data])
    say(socket, READY)


@contextlib.contextmanager
def orchestrator(folder: Path) -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """The orchestrator and the door for workers."""
    KeyFolder(folder / "keys").server()
    settings = OrchestratorSettings(queue_limit=1_000_000, listen_workers="tcp://127.0.0.1:0")
    inside = f"ipc://{folder}/d"
    spec = OrchestratorSpec(
        state=folder, clients=f"ipc://{folder}/c", workers=f"ipc://{folder}/w", doors={"worker": inside}, guarded=True,
        settings=settings,
    )  # fmt: skip
    door = DoorSpec(state=folder, role="worker", inside=inside, guarded=True)
    with Path(f"{folder}.log").open("ab") as log:
        processes = [
            subprocess.Popen([sys.executable, "-m", module, given.model_dump_json()], stderr=log)
            for module, given in (("orchestrator.server", spec), ("orchestrator.doors", door))
        ]
    try:
        while "worker" not in published(folder):
            time.sleep(0.02)
        yield psutil.Process(processes[0].pid), psutil.Process(processes[1].pid)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def published(folder: Path) -> dict[str, str]:
    try:
        remote: dict[str, str] = json.loads((folder / PUBLISHED).read_text())["remote"]
    except (OSError, ValueError, KeyError):
        return {}
    return remote


def supervise(endpoint: str) -> None:
    """Let all hosts in that come, as a supervisor does; until this process ends."""
    link = dealer(zmq.Context(), endpoint, new_identity())
    while True:
        say(link, wire.encode(SupervisorHello(pid=os.getpid())))
        until = time.monotonic() + 1
        while link.poll(max(0, int((until - time.monotonic()) * 1000))):
            message = wire.decode(receive(link), TO_SUPERVISOR).message
            if isinstance(message, HostJoined):
                say(link, wire.encode(HostPlanned(host=message.host, gpus="{}")))


@contextlib.contextmanager
def fleet(folder: Path, hosts: int, each: int, local: bool) -> Iterator[None]:
    keys = KeyFolder(folder / "keys")
    endpoint, paths = published(folder)["worker"], []
    for number in range(hosts):
        path = folder / f"host{number}.key"
        if not local:
            save(path, keys.issue(f"host{number}", "host", endpoint))
        paths.append(f"ipc://{folder}/w" if local else str(path))
    threading.Thread(target=supervise, args=(f"ipc://{folder}/w",), daemon=True).start()
    share = -(-hosts // FEEDERS)
    feeders = [
        subprocess.Popen([sys.executable, "-m", "scripts.bench.fleet", "--feed", str(each), "--first", str(start),
                          *(word for path in paths[start : start + share] for word in ("--key", str(path)))])
        for start in range(0, hosts, share)
    ]  # fmt: skip
    try:
        yield
    finally:
        for feeder in feeders:
            feeder.kill()
            feeder.wait()


def cpu(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def decisions(client: Client) -> tuple[tuple[float, ...], list[int], int]:
    """The bounds of the buckets of decisions' seconds, how many fell into each, and all."""
    for metric in client.metrics():
        if metric.name == "decision_seconds":
            (sample,) = metric.samples
            return metric.limits, list(sample.counts), sum(sample.counts)
    raise LookupError("no decision was made")


def row(**values: Any) -> None:
    print(json.dumps(values), flush=True)


@click.command()
@click.option("--hosts", default=125, show_default=True)
@click.option("--each", default=8, show_default=True, help="workers of each host")
@click.option("--jobs", default=20_000, show_default=True)
@click.option("--queued", default=100_000, show_default=True)
@click.option("--local", is_flag=True, help="Workers of this machine's own, over ipc, without hosts, keys or a door.")
@click.option("--feed", type=int, hidden=True)
@click.option("--first", type=int, default=0, hidden=True)
@click.option("--key", "keys", multiple=True, hidden=True, help="A host's key file, or where a local one's come.")
def main(
    hosts: int, each: int, jobs: int, queued: int, local: bool, feed: int | None, first: int, keys: tuple[str, ...]
) -> None:
    """Many workers that do nothing."""
    if feed is not None:
        play(list(keys), feed, first)
        return
    with tempfile.TemporaryDirectory(prefix="tf-") as name:
        folder = Path(name)
        with (
            orchestrator(folder) as (server, door),
            fleet(folder, hosts, each, local),
            Client(folder, timeout=120) as client,
        ):
            begun = time.monotonic()
            while len(client.workers().workers) < hosts * each:
                assert time.monotonic() - begun < JOIN_SECONDS, "not all workers have come"
                time.sleep(1)
            joined = time.monotonic() - begun
            time.sleep(5)
            used, outside, start = cpu(server), cpu(door), time.monotonic()
            time.sleep(IDLE_SECONDS)
            seconds = time.monotonic() - start
            row(what="idle", workers=hosts * each, hosts=hosts, joined_s=round(joined, 1),
                orchestrator_of_a_core=round((cpu(server) - used) / seconds, 3),
                door_of_a_core=round((cpu(door) - outside) / seconds, 3), goal=0.15,
                rss_mb=round(server.memory_info().rss / 1e6, 1), known=len(client.workers().workers))  # fmt: skip
            push(client, server, jobs, hosts * each, "jobs", 4000)
            push(client, server, queued, hosts * each, "queued", queued)


def push(client: Client, server: psutil.Process, jobs: int, workers: int, what: str, most: int) -> None:
    """Have jobs done, of which up to `most` are queued at once."""
    client.submit("warm up")
    _, before, _ = decisions(client)
    start, used, sent, marks = time.perf_counter(), cpu(server), 0, list[float]()
    begin = dict(client.stack().counts).get("done", 0)
    while (done := dict(client.stack().counts).get("done", 0) - begin) < jobs:
        if sent < jobs and sent - done < most:
            count = min(1000, jobs - sent)
            client.submit_many([JobRequest(prompt=f"{what} {sent + i}") for i in range(count)])
            sent += count
        if done >= (len(marks) + 1) * jobs // 5:
            marks.append(round(server.memory_info().rss / 1e6, 1))
        if sent == jobs or sent - done >= most:
            threading.Event().wait(0.1)
    seconds = time.perf_counter() - start
    bounds, after, _ = decisions(client)
    counts = [late - early for late, early in zip(after, before, strict=True)]
    row(what=what, workers=workers, jobs=jobs, jobs_per_s=round(jobs / seconds), goal_jobs_per_s=1000, rss_mb=marks,
        orchestrator_of_a_core=round((cpu(server) - used) / seconds, 2), decisions=sum(counts),
        p50_s=at_most(bounds, counts, 0.5), p99_s=at_most(bounds, counts, 0.99), goal_p99_s=0.005)  # fmt: skip


def at_most(bounds: tuple[float, ...], counts: list[int], share: float) -> float | str:
    """Return the bound of the bucket in which a share of all falls."""
    total, wanted = 0, share * sum(counts)
    for bound, count in zip(bounds, counts, strict=False):
        total += count
        if total >= wanted:
            return bound
    return f"more than {bounds[-1]}"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
