#!/usr/bin/env python
"""Coverage-guided fuzzing of all that takes bytes from outside: the decoder, and the orchestrator behind it.

    python -m scripts.faults.fuzz decoder -max_total_time=60
    python -m scripts.faults.fuzz orchestrator -max_total_time=60 [FOLDER]
    python -m scripts.faults.fuzz kept         what earlier runs found to reach far, once more, without atheris

An input is a conversation: messages from workers and clients, before and after they have said hello. What it finds is
whatever raises anything but a ProtocolError, or ends the orchestrator. Every other peer holds a key, the others are
this machine's user. Options are libFuzzer's; what it learns is kept in FOLDER. Needs atheris.
"""

import logging
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from orchestrator.principal import LOCAL_USER, KeyHolder
from orchestrator.server.loop import Server
from orchestrator.settings import OrchestratorSettings
from orchestrator.state_folder import StackFolder
from protocol import wire
from protocol.errors import ProtocolError, VersionMismatch
from protocol.gpu_memory import Lease, WeightNeed
from protocol.job import JobRequest
from protocol.messages.client import Cancel, FetchPictures, GetJobs, Retry, Submit, Watch
from protocol.messages.common import Message
from protocol.messages.worker import Leased, Progress, Ready, Result, TaskFailed, WorkerHello
from protocol.model import ModelDescription
from protocol.stages import Stage
from protocol.tensors import Tensor

PEERS = 4  # of each kind
MODEL = ModelDescription(
    model="fuzz", revision="r", pipeline="P", size_multiple=16, width=64, height=64, max_pixels=1 << 20, steps=4,
    guidance=3.5, cfg_scale=1.0, negative_prompt=True, max_sequence_length=64, max_sequence_limit=512,
)  # fmt: skip
Part = tuple[int, list[bytes]]  # (who: worker 0 … 3 or client 4 … 7, frames)


def pack(parts: Sequence[Part]) -> bytes:
    out = bytearray()
    for who, frames in parts:
        out += struct.pack("<BB", who, len(frames))
        for frame in frames:
            out += struct.pack("<H", len(frame)) + frame
    return bytes(out)


def parts_of(data: bytes) -> Iterator[Part]:
    """Read any bytes as a conversation."""
    at = 0
    while at + 2 <= len(data):
        who, count = data[at] % (2 * PEERS), data[at + 1] % 8
        at += 2
        frames = []
        for _ in range(count):
            if at + 2 > len(data):
                break
            (size,) = struct.unpack_from("<H", data, at)
            frames.append(data[at + 2 : at + 2 + size])
            at += 2 + size
        yield who, frames


def decoder() -> Callable[[bytes], None]:
    def one_input(data: bytes) -> None:
        for _, frames in parts_of(data):
            try:
                envelope = wire.decode(frames)
            except (ProtocolError, VersionMismatch):
                continue
            again = wire.decode([bytes(frame) for frame in wire.encode(envelope.message, envelope.tensors)])
            assert again.message == envelope.message or "nan" in repr(again.message)

    return one_input


class Finding(logging.Handler):
    """Look for what the orchestrator catches so that others can go on."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            raise record.exc_info[1]


def orchestrator() -> Callable[[bytes], None]:
    """Return a target: an orchestrator whole but for the sockets' other ends, anew for every thousand conversations."""
    logging.getLogger("orchestrator").addHandler(Finding())
    logging.getLogger("orchestrator").propagate = False
    room = tempfile.TemporaryDirectory(prefix="fuzz-")
    turn, server = 0, None

    def one_input(data: bytes) -> None:
        nonlocal turn, server
        if turn % 1000 == 0 or server is None:
            if server is not None:
                server._close()
            folder = StackFolder(Path(room.name) / str(turn))
            folder.create()
            server = Server(folder, folder.local_endpoints(), OrchestratorSettings(keep=False, queue_limit=64), {}, {})
        turn += 1
        for who, frames in parts_of(data):
            peer = bytes([1 if who < PEERS else 0]) + b"T%015d" % (turn * 8 + who)
            principal = KeyHolder(f"key{who}") if who % 2 else LOCAL_USER
            if who < PEERS:
                server._workers.handle(peer, principal, [*frames])
            else:
                server._clients.handle(peer, principal, [*frames])
            server._settle()

    return one_input


def said(who: int, message: Message, *tensors: Tensor) -> Part:
    return who, [bytes(frame) for frame in wire.encode(message, tensors)]


def seeds() -> list[bytes]:
    """Conversations as they should be, for a beginning."""

    def hello(who: int, stage: Stage, *gpus: int) -> Part:
        return said(
            who,
            WorkerHello(
                name=stage, stage=stage, pid=who, host="h", device="cpu", dtype="float32", model=MODEL, gpus=gpus
            ),
        )

    small = Tensor("prompt_embeds", "float32", (1, 2), bytes(8))
    saved = Tensor("checkpoint:state", "uint8", (2,), b"ab")
    pictures = Tensor("pictures", "uint8", (1, 2, 2, 3), bytes(12))
    job = "job1"
    submit = said(4, Submit(request=1, jobs=(JobRequest(prompt="a", id=job, width=64, height=64),), watch=True))
    whole = [
        hello(0, "text"), said(0, Ready()), hello(1, "denoise"), said(1, Ready()), hello(2, "vae"), said(2, Ready()),
        submit, said(0, Result(job=job, stage="text", attempt=1, seconds=1.0, next="denoise"), small), said(0, Ready()),
        said(1, Progress(job=job, stage="denoise", attempt=2, step=1, steps=4, saved=1), saved),
        said(1, Result(job=job, stage="denoise", attempt=2, seconds=1.0, next="vae"), small), said(1, Ready()),
        said(2, Result(job=job, stage="vae", attempt=3, seconds=1.0), pictures), said(2, Ready()),
        said(4, FetchPictures(request=2, job=job)), said(4, Watch(request=3, jobs=(job,))),
    ]  # fmt: skip
    failing = [
        hello(0, "text"), said(0, Ready()), submit,
        said(0, TaskFailed(job=job, stage="text", attempt=1, reason="no", retry=True)), said(0, Ready()),
        said(4, Cancel(request=2, jobs=(job,))), said(4, Retry(request=3, jobs=(job,))), said(4, GetJobs(request=4)),
        hello(1, "denoise", 0),
        said(1, Ready(needs=(WeightNeed(weights=9, least=1, workspace=1),), current_task=(job, "denoise", 1))),
        said(1, Leased(leases=(Lease(bytes=5, weight_bytes=3),))),
    ]  # fmt: skip
    return [pack(whole), pack(failing), *(pack([part]) for part in (*whole, *failing))]


def kept(target: str) -> list[bytes]:
    """Inputs that earlier runs found to reach what no others do: corpus/TARGET.zip, as -merge=1 left it."""
    with zipfile.ZipFile(Path(__file__).parent / "corpus" / f"{target}.zip") as archive:
        return [archive.read(name) for name in sorted(archive.namelist())]


TARGETS = {"decoder": decoder, "orchestrator": orchestrator}


def main() -> None:
    import atheris

    target, options = sys.argv[1], sys.argv[2:]
    atheris.instrument_all()
    with tempfile.TemporaryDirectory(prefix="corpus-") as corpus:
        for number, seed in enumerate([*seeds(), *kept(target)]):
            (Path(corpus) / f"seed{number}").write_bytes(seed)
        one_input = TARGETS[target]()
        atheris.Setup([sys.argv[0], *options, corpus], one_input)
        atheris.Fuzz()


def replay() -> None:
    """Run what was kept, without fuzzing; it ends with an error where one does."""
    for target, make in TARGETS.items():
        one_input, inputs = make(), [*seeds(), *kept(target)]
        for data in inputs:
            one_input(data)
        print(f"{target}: {len(inputs)} conversations")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in (*TARGETS, "kept"):
        sys.exit(f"{__doc__}\nTargets: {', '.join(TARGETS)}")
    replay() if sys.argv[1] == "kept" else main()
