"""Hostile peers in processes of their own, beside an orchestrator with keys."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from orchestrator.access import KeyFolder
from protocol.client.client import Client
from protocol.curve_keys import PeerKey, Role, save
from tests.fakes import MODEL, Orchestrator, orchestrator
from tests.tiny import environment

OPEN = {"listen": "tcp://127.0.0.1:0", "listen_workers": "tcp://127.0.0.1:0"}
MEGABYTE = 1 << 20


@contextlib.contextmanager
def guarded(state: Path, environment: Mapping[str, str] | None = None, **settings: object) -> Iterator[Orchestrator]:
    """An orchestrator with keys, whose model this machine's own worker has told."""
    KeyFolder(state / "keys").server()
    with orchestrator(state, environment, **OPEN, **settings) as running:
        running.worker("vae")
        yield running


def key_of(running: Orchestrator, name: str, role: Role = "client") -> PeerKey:
    """Let a key in."""
    return KeyFolder(running.folder / "keys").issue(name, role, running.remote[role])


def file_of(running: Orchestrator, key: PeerKey) -> Path:
    path = running.folder / f"{key.name}.key"
    save(path, key)
    return path


def client_of(running: Orchestrator, name: str, timeout: float = 20) -> Client:
    running._opened.append(client := Client(file_of(running, key_of(running, name)), timeout=timeout))
    return client


@contextlib.contextmanager
def hostile(
    running: Orchestrator, deed: str, role: Role = "client", name: str = "mallory", model: bool = False
) -> Iterator[None]:
    """A peer that does what it should not for as long as this lasts."""
    command = [
        sys.executable, "-m", "scripts.faults.hostile", deed, str(file_of(running, key_of(running, name, role)))
    ]  # fmt: skip
    if model:
        (path := running.folder / "model.json").write_text(MODEL.model_dump_json())
        command += ["--model", str(path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    try:
        yield
        assert process.poll() is None  # it is still at it
    finally:
        process.kill()
        process.wait()


def megabytes(process: subprocess.Popen[bytes]) -> float:
    """Resident memory."""
    return float(psutil.Process(process.pid).memory_info().rss) / MEGABYTE
