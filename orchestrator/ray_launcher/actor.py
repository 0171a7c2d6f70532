"""The actor that keeps an agent of the stack on a Ray node: process life alone. What the agent does, ZeroMQ carries.

Ray knows names, a public key and an endpoint of it. The node's secret is made on the node and stays there.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from orchestrator.ray_launcher.asked import Asked
from orchestrator.state_folder import StackFolder, end_stack
from orchestrator.supervisor.host_agent import ENDED_WITH_STACK
from protocol.client.endpoints import default_folder
from protocol.curve_keys import KeyPair, PeerKey, load, write_key
from protocol.errors import BadRequest, TriptychError
from protocol.process import LIFELINE

SET_BY_RAY = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
OF_RAY = ("RAY_", "PYTHONUNBUFFERED")
GRACE_SECONDS = 12.0  # that an agent may take for its end
AGAIN_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before an agent that has ended is started again
HEALTHY_SECONDS = 60.0
UNLIKELY_SOON = (2, 4, 5, 8)  # exit codes after which another try gives the same, until somebody has done something
REFUSED_SECONDS = 60.0  # until the next one


class HostActor:
    """An agent, started again whenever it has ended; it ends with this process.

    Ray makes the actor anew, with the same arguments, where its process has died: it finds the key again.
    """

    def __init__(self, name: str, stack: str, comes_and_goes: bool = False) -> None:
        """One that `comes_and_goes` ends where no launcher asks for it any more, so that its node can go."""
        self._called = Asked() if comes_and_goes else None
        self._name = name
        self._folder = StackFolder(default_folder().with_name(f"triptych-{stack}-{name}"))
        self._folder.create()
        self._folder.keys.mkdir(mode=0o700, exist_ok=True)
        self._key_file = self._folder.keys / "agent.json"
        self._key = self._key_of_node()
        self._agent: subprocess.Popen[bytes] | None = None
        self._lifeline, self._life = os.pipe()
        self._reason = ""
        self._asked = 0  # times that it was told to join
        self._wanted, self._hurry = threading.Event(), threading.Event()
        self._changed = threading.Lock()
        if self._key.endpoint:
            self._wanted.set()
        threading.Thread(target=self._keep, daemon=True, name="agent").start()

    def _key_of_node(self) -> PeerKey:
        with contextlib.suppress(BadRequest):
            return load(self._key_file)
        pair = KeyPair.new()
        return self._save(PeerKey(self._name, "host", "", pair.public, pair.public, pair.secret))

    def _save(self, key: PeerKey) -> PeerKey:
        write_key(self._key_file, key)
        return key

    def public(self) -> str:
        """Return the node's public key, which the stack has to let in."""
        return self._key.public

    def join(self, endpoint: str, server: str) -> None:
        """Let the agent work for the stack at an endpoint, whose public key is `server`, from now on."""
        with self._changed:
            if (endpoint, server) != (self._key.endpoint, self._key.server) or not self._key.endpoint:
                self._key = self._save(replace(self._key, endpoint=endpoint, server=server))
                self._end()
            self._reason, self._asked = "", self._asked + 1
            self._wanted.set()
            self._hurry.set()

    def state(self) -> dict[str, Any]:
        """Return whether the agent runs, why it does not, and how this node treats processes."""
        if self._called:
            self._called.again()
        pid = self._agent.pid if self._agent and self._agent.poll() is None else None
        return {
            "pid": pid,
            "reason": self._reason,
            "niceness": os.getpriority(os.PRIO_PROCESS, pid) if pid else 0,
        }

    def stop(self) -> None:
        """End the agent, whose workers end in good order."""
        self._wanted.clear()
        with self._changed:
            self._end()

    def _end(self) -> None:
        if self._agent is not None and self._agent.poll() is None:
            self._agent.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._agent.wait(GRACE_SECONDS)
            self._agent.kill()

    # -- the agent's life, in a thread of its own ------------------------------------------------

    def _keep(self) -> None:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)  # of this thread, from which the agent has it: Ray's workers have 15
        failures = 0
        while True:
            self._wanted.wait()
            begun, asked = time.monotonic(), self._asked
            try:
                with self._changed:
                    self._agent = self._start()
                code = self._agent.wait()
            except OSError as error:
                code, self._reason = 1, f"it can't be started: {error}"
            if code == ENDED_WITH_STACK and asked == self._asked:
                self._wanted.clear()
            if not self._wanted.is_set():
                continue
            if code in UNLIKELY_SOON:
                self._reason = last_line(self._folder.log("agent"))
            failures = 1 if time.monotonic() - begun > HEALTHY_SECONDS else failures + 1
            pause = REFUSED_SECONDS if code in UNLIKELY_SOON else AGAIN_SECONDS[min(failures, len(AGAIN_SECONDS)) - 1]
            self._hurry.wait(pause)
            self._hurry.clear()

    def _start(self) -> "subprocess.Popen[bytes]":
        with contextlib.suppress(TriptychError):
            end_stack(self._folder.path)  # an agent whose actor is on its way out, its node having died
        command = [sys.executable, "-m", "orchestrator.cli", "join", str(self._key_file)]
        with self._folder.log("agent").open("ab") as log:
            return subprocess.Popen(
                [*command, "--folder", str(self._folder.path), "--once"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(self._lifeline,),
                env={**environment_of_node(), LIFELINE: str(self._lifeline)},
            )


def environment_of_node() -> dict[str, str]:
    """Return the environment as Ray's own process on this node has it.

    For its workers Ray hides GPUs and sets the number of threads, which can change bits.
    """
    try:
        found = psutil.Process(os.getppid()).environ()
    except psutil.Error:
        found = {name: value for name, value in os.environ.items() if name not in SET_BY_RAY}
    return {name: value for name, value in found.items() if not name.startswith(OF_RAY)}


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][:500] if lines else ""
