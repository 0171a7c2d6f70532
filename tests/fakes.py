"""A worker that speaks the protocol and computes nothing, and an orchestrator of its own process to speak to."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import zmq

from orchestrator.access import KeyFolder
from orchestrator.settings import DoorSpec, OrchestratorSettings, OrchestratorSpec
from protocol import wire
from protocol.client.client import Client
from protocol.client.endpoints import PUBLISHED, Endpoints, published
from protocol.curve_keys import PeerKey, Role
from protocol.gpu_memory import WeightNeed
from protocol.messages.common import Error, Heartbeat, Message, Welcome
from protocol.messages.worker import TO_WORKER, Leased, Progress, Ready, Result, SetLease, Task, TaskFailed, WorkerHello
from protocol.model import ModelDescription
from protocol.sockets import dealer, new_identity, receive
from protocol.stages import USUAL_NEXT, Stage
from protocol.tensors import Tensor

MODEL = ModelDescription(
    model="fake",
    revision="r1",
    pipeline="FakePipeline",
    size_multiple=16,
    width=64,
    height=64,
    max_pixels=1 << 20,
    steps=4,
    guidance=3.5,
    cfg_scale=1.0,
    negative_prompt=True,
    max_sequence_length=64,
    max_sequence_limit=512,
)
OUTPUTS: dict[Stage, Tensor] = {
    "text": Tensor("prompt_embeds", "float32", (1, 2), bytes(8)),
    "denoise": Tensor("decode:0", "float32", (1, 2), bytes(8)),
    "vae": Tensor("pictures", "uint8", (1, 2, 2, 3), bytes(range(12))),
}
PIDS = itertools.count(10_000_000)  # of no process: two workers never share one
M = TypeVar("M", bound=Message)
PATIENCE_MS = 20_000


class FakeWorker:
    """Does what the test says, when it says so."""

    def __init__(
        self,
        endpoint: str,
        stage: Stage,
        name: str | None = None,
        model: ModelDescription = MODEL,
        gpus: tuple[int, ...] = (),
        pid: int | None = None,
        part: int = 0,
        parts: int = 1,
        key: PeerKey | None = None,
        speedups: tuple[str, ...] = (),
    ) -> None:
        self.stage, self.key, self.pid = stage, key, pid or next(PIDS)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = dealer(self._context, key.endpoint if key else endpoint, new_identity(), key)
        self.seen: list[wire.Envelope] = []
        self.say(
            WorkerHello(
                name=name or f"fake-{stage}",
                stage=stage,
                pid=self.pid,
                host=socket.gethostname(),
                device="none",
                dtype="float32",
                model=model,
                gpus=gpus,
                part=part,
                parts=parts,
                speedups=speedups,
            )
        )
        self.hear(Welcome)

    def say(self, message: Message, *tensors: Tensor) -> None:
        assert self.socket.poll(PATIENCE_MS, zmq.POLLOUT)
        self.socket.send_multipart(wire.encode(message, tensors))

    def hear(self, kind: type[M]) -> M:
        """The next message of a kind; others before it are skipped."""
        while True:
            assert self.socket.poll(PATIENCE_MS), f"no {kind.kind} came"
            envelope = wire.decode(receive(self.socket), TO_WORKER)
            self.seen.append(envelope)
            if isinstance(envelope.message, kind):
                return envelope.message

    def hear_any(self) -> Message:
        """The next message."""
        assert self.socket.poll(PATIENCE_MS)
        self.seen.append(wire.decode(receive(self.socket), TO_WORKER))
        return self.seen[-1].message

    def ready(self, *needs: WeightNeed, **fields: Any) -> "FakeWorker":
        self.say(Ready(needs=needs, **fields))
        return self

    def obey(self) -> SetLease:
        """Do what the next lease says."""
        lease = self.hear(SetLease)
        self.say(Leased(leases=lease.leases))
        return lease

    def take(self) -> Task:
        return self.hear(Task)

    def take_in_time(self) -> Task:
        """Give signs of life until a task comes, however long that takes."""
        while True:
            self.say_beat()
            assert self.socket.poll(PATIENCE_MS)
            while self.socket.poll(100):
                if isinstance(message := self.hear_any(), Task):
                    return message

    def inputs(self) -> dict[str, bytes]:
        """What lay beside the last message that was heard."""
        return {tensor.name: bytes(tensor.data) for tensor in self.seen[-1].tensors}

    def progress(self, task: Task, step: int, saved: bool = True) -> None:
        """Tell of a step, with a checkpoint that says which."""
        tensor = Tensor("checkpoint:state", "uint8", (2,), step.to_bytes(2, "big"))
        key = {"job": task.job, "stage": task.stage, "attempt": task.attempt}
        self.say(Progress(**key, step=step, steps=4, saved=step if saved else 0), *([tensor] if saved else []))

    def fail(self, task: Task, reason: str = "hiccup", retry: bool = True) -> None:
        self.say(TaskFailed(job=task.job, stage=task.stage, attempt=task.attempt, reason=reason, retry=retry))
        self.ready()

    def finish(self, task: Task, seconds: float = 0.1) -> None:
        result = Result(
            job=task.job, stage=task.stage, attempt=task.attempt, seconds=seconds, next=USUAL_NEXT[task.stage]
        )
        self.say(result, OUTPUTS[task.stage])

    def say_beat(self) -> None:
        """Give a sign of life."""
        self.say(Heartbeat(rss_bytes=1, gpu_bytes=0))

    def settle(self) -> None:
        """Return once everything said so far has been handled."""
        from protocol.messages.common import Beat

        self.say_beat()
        self.hear(Beat)

    def close(self) -> None:
        self.socket.close(linger=0)
        self._context.term()


class Orchestrator:
    """The orchestrator's process alone, with fake workers and a client; it can be killed and started again."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None, **settings: object) -> None:
        self.folder, self._settings = folder, settings
        self._environment = {**os.environ, **(environment or {})}
        self._scratch = tempfile.TemporaryDirectory(prefix="tt-")
        self._log = Path(self._scratch.name) / "orchestrator.log"
        self._door_log = Path(self._scratch.name) / "doors.log"
        self._opened: list[FakeWorker | Client] = []
        self.doors: dict[Role, subprocess.Popen[bytes]] = {}
        self._guarded = KeyFolder(folder / "keys").exists
        self.endpoints = Endpoints(f"ipc://{folder}/c", f"ipc://{folder}/w")
        self.start()

    def start(self) -> None:
        settings = OrchestratorSettings.model_validate(
            {"queue_limit": 50, "embedding_cache": 1_000_000, "keep_pictures": 1_000_000, **self._settings}
        )
        doors = {role: f"ipc://{self.folder}/d{role[0]}" for role, _ in settings.remote()}
        spec = OrchestratorSpec(
            state=self.folder, clients=self.endpoints.clients, workers=self.endpoints.workers, doors=doors,
            guarded=self._guarded, settings=settings,
        )  # fmt: skip
        command = [sys.executable, "-m", "orchestrator.server", spec.model_dump_json()]
        (self.folder / "stack.json").unlink(missing_ok=True)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, env=self._environment)
        while not (self.folder / PUBLISHED).exists():  # it writes it in one go, once it listens
            assert self.process.poll() is None, self.log()
            time.sleep(0.01)
        assert published(self.folder) == self.endpoints
        for role in doors:
            if role not in self.doors:
                self.open_door(role)
        while (remote := json.loads((self.folder / PUBLISHED).read_text())["remote"]).keys() != doors.keys():
            time.sleep(0.01)
        self.remote: dict[str, str] = remote

    def open_door(self, role: Role, by: Sequence[str] = ()) -> None:
        """Start a role's door, by a command before it where one is given."""
        inside = f"ipc://{self.folder}/d{role[0]}"
        door = DoorSpec(state=self.folder, role=role, inside=inside, guarded=self._guarded)
        command = [*by, sys.executable, "-m", "orchestrator.doors", door.model_dump_json()]
        with self._door_log.open("ab") as log:
            self.doors[role] = subprocess.Popen(command, stderr=log, env=self._environment)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def log(self) -> str:
        """What the process has said since it started."""
        return self._log.read_text()

    def door_log(self) -> str:
        """Return the doors' log."""
        return self._door_log.read_text() if self._door_log.exists() else ""

    def worker(self, stage: Stage, **arguments: object) -> FakeWorker:
        self._opened.append(worker := FakeWorker(self.endpoints.workers, stage, **arguments))
        return worker

    @property
    def workers(self) -> list[FakeWorker]:
        return [opened for opened in self._opened if isinstance(opened, FakeWorker)]

    def client(self) -> Client:
        self._opened.append(client := Client(self.folder, timeout=20))
        return client

    def restart(self) -> None:
        """Killed without a warning, and started again."""
        self.kill()
        self.start()

    def stop(self) -> str:
        for opened in self._opened:
            opened.close()
        for process in (self.process, *self.doors.values()):
            process.send_signal(signal.SIGTERM)
        for process in (self.process, *self.doors.values()):
            process.wait(timeout=20)
        said = self.log()
        self._scratch.cleanup()
        return said


@contextlib.contextmanager
def orchestrator(
    folder: Path, environment: Mapping[str, str] | None = None, **settings: object
) -> Iterator[Orchestrator]:
    """Its settings are OrchestratorSettings'."""
    running = Orchestrator(folder, environment, **settings)
    try:
        yield running
    finally:
        log = running.stop()
    assert "Traceback" not in log, log
    assert running.process.returncode == 0, log


def raw_dealer(endpoint: str) -> tuple[zmq.Context[zmq.Socket[bytes]], zmq.Socket[bytes]]:
    """A peer that sends whatever it likes."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peer = dealer(context, endpoint, new_identity())
    assert peer.poll(PATIENCE_MS, zmq.POLLOUT)
    return context, peer


def error_of(frames: list[bytes]) -> Error:
    message = wire.decode(frames).message
    assert isinstance(message, Error)
    return message
