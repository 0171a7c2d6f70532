"""Hostile peers beside a stack, in processes of their own, and what others notice of them: for soak and bench."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from orchestrator.access import KeyFolder
from orchestrator.state_folder import StackFolder
from protocol.client.client import Client
from protocol.curve_keys import DoorRole, save
from protocol.errors import TriptychError
from protocol.model import ModelDescription

Deed = tuple[str, str, DoorRole]  # the name of its key, what it does, and in which role
THREE: tuple[Deed, ...] = (
    ("mallory", "ask", "client"),
    ("mallet", "unread", "client"),
    ("trudy", "vanish", "worker"),
)
LOOK_SECONDS = 0.1


class HostilePeers:
    """Peers, begun again when they end, by their deeds; and bob, who has a key and is to be served meanwhile."""

    def __init__(self, folder: Path, deeds: Sequence[Deed] = THREE) -> None:
        self._folder, self._state, self._deeds = folder, folder / "state", deeds
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="peers")
        self.most_megabytes: dict[str, float] = {}  # by process
        self.answers: dict[str, list[float]] = {"local": [], "bob": []}  # seconds that they waited for one
        self.begun: Counter[str] = Counter()

    def let_in(self) -> list[str]:
        """Make their keys; return the options by which the stack listens for them."""
        StackFolder(self._state).create()
        keys, options = KeyFolder(self._state / "keys"), list[str]()
        flags: tuple[tuple[DoorRole, str], ...] = (("client", "--listen"), ("worker", "--listen-workers"))
        for role, flag in flags:
            endpoint = f"tcp://127.0.0.1:{free_port()}"
            options += [flag, endpoint]
            for name in [name for name, _, of in (*self._deeds, ("bob", "", "client")) if of == role]:
                save(self._folder / f"{name}.key", keys.issue(name, role, endpoint))
        return options

    def start(self, model: ModelDescription) -> None:
        (self._folder / "model.json").write_text(model.model_dump_json())
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            for name, deed, role in self._deeds:
                if name not in self._processes or self._processes[name].poll() is not None:
                    self._processes[name] = self._begin(name, deed, role)
                    self.begun[deed] += 1
            with contextlib.suppress(TriptychError, psutil.Error):
                self._look()

    def _look(self) -> None:
        for who, where in (("local", self._state), ("bob", self._folder / "bob.key")):
            with Client(where, timeout=30) as client:
                client.stack()  # a connection that is there
                begun = time.monotonic()
                client.jobs(limit=10)
                self.answers[who].append(time.monotonic() - begun)
                if who == "local":
                    for process in client.workers().processes:
                        if process.pid and process.name.startswith(("orchestrator", "door")):
                            size = psutil.Process(process.pid).memory_info().rss / (1 << 20)
                            self.most_megabytes[process.name] = max(size, self.most_megabytes.get(process.name, 0.0))

    def _begin(self, name: str, deed: str, role: DoorRole) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "scripts.faults.hostile", deed, str(self._folder / f"{name}.key")]
        command += ["--model", str(self._folder / "model.json")] if deed == "vanish" else []
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        for process in self._processes.values():
            process.kill()
            process.wait()

    def report(self) -> dict[str, Any]:
        waits = {who: [round(float(np.quantile(found, q)), 3) for q in (0.5, 0.99, 1.0)] if found else []
                 for who, found in self.answers.items()}  # fmt: skip
        return {
            "peers began": dict(self.begun),
            "at most, MB": {name: round(size) for name, size in self.most_megabytes.items()},
            **{f"an answer for {who} p50/p99/max, s": found for who, found in waits.items()},
        }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
