"""Things done to a running stack on purpose, and how long it takes to be itself again. For soak.py and tests/faults."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from protocol.client.client import Client
from protocol.errors import TriptychError
from protocol.messages.client import Workers

PATIENCE_SECONDS = 120.0
POLL_SECONDS = 0.02


class Stack:
    """`triptych up` in a process of its own; it can be killed and started again on the same state."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.folder, self._arguments = folder, arguments
        self.seen: dict[int, float] = {}  # all processes that there ever were: number and start
        self.start()

    def start(self) -> None:
        with (self.folder / "up.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli", "up", "--state", str(self.folder / "state"), "--json",
                 *self._arguments],
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (self.folder / "up.log").read_text()[-3000:]
        json.loads(line)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def remember(self) -> None:
        """Note the processes that there are, to ask for them at the end."""
        with contextlib.suppress(psutil.Error):
            top = psutil.Process(self.process.pid)
            for process in (top, *top.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    self.seen[process.pid] = process.create_time()

    def orphans(self) -> list[int]:
        """Processes of the stack that still live."""
        found = []
        for pid, created in self.seen.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
        return found

    def stop(self) -> int:
        """Stop the stack as Ctrl-C does; its exit code."""
        self.remember()
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=60)
        return self.process.returncode


def patiently(action: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until something is true, whatever is raised meanwhile."""
    deadline = time.monotonic() + seconds
    error: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if action():
                return
        except (TriptychError, OSError) as caught:
            error = caught
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"it never came to hold; last: {error}")


class Saboteur:
    """Does one thing at a time, and waits until the stack has got over it."""

    def __init__(self, stack: Stack, rng: random.Random) -> None:
        self._stack, self._rng = stack, rng
        self._client: Client | None = None

    def close(self) -> None:
        if self._client:
            self._client.close()
            self._client = None

    def client(self) -> Client:
        self._client = self._client or Client(self._stack.state, timeout=0.5)
        return self._client

    def workers(self) -> Workers:
        """Return the workers and processes, as the orchestrator tells them."""
        return self.client().workers()

    def pid_of(self, name: str) -> int | None:
        """Return the number of a process by its name in `triptych workers`; ask until there is one."""
        found: list[int] = []

        def look() -> bool:
            found[:] = [p.pid for p in self.workers().processes if p.name == name and p.pid]
            return bool(found)

        self.patiently(look)
        return found[0]

    def whole(self, workers: Workers) -> bool:
        """Return whether all workers that the supervisor keeps are registered, and have their models loaded."""
        wanted = {(p.name, p.pid) for p in workers.processes if p.stage is not None}
        there = {(w.name, w.pid) for w in workers.workers if w.state != "loading"}
        return bool(wanted) and wanted <= there

    def signal(self, name: str, number: signal.Signals) -> float:
        """Send a signal to a process; seconds until another is in its place."""
        pid = self.pid_of(name)
        assert pid is not None
        start = time.monotonic()
        os.kill(pid, number)

        def replaced() -> bool:
            if name == "orchestrator":
                return self.client().stack().pid != pid
            workers = self.workers()
            if name in ("forkserver", "http"):
                return any(p.name == name and p.pid not in (None, pid) for p in workers.processes)
            return any(w.name == name and w.pid != pid and w.state != "loading" for w in workers.workers)

        self.patiently(replaced)
        return time.monotonic() - start

    def patiently(self, action: Callable[[], object]) -> None:
        """Wait until something is true, with a new connection after each failure."""

        def attempt() -> object:
            try:
                return action()
            except TriptychError:
                self.close()
                raise

        patiently(attempt)

    def end_supervisor(self) -> float:
        """Kill the supervisor, and start it again as a person would; seconds until all its workers are ready."""
        start = time.monotonic()
        self._stack.process.kill()
        self._stack.process.communicate()
        patiently(lambda: not self._stack.orphans())
        self._stack.start()
        self.patiently(lambda: self.whole(self.workers()))
        return time.monotonic() - start

    def spoil_artifact(self, kinds: tuple[str, ...]) -> bool:
        """Change a byte of an artifact on disk; False if there is none."""
        database = self._stack.state / "jobs.sqlite"
        with contextlib.closing(sqlite3.connect(database, timeout=20)) as db, db:
            marks = ",".join("?" * len(kinds))
            rows = db.execute(f"SELECT key, file, data FROM artifacts WHERE kind IN ({marks})", kinds).fetchall()
            if not rows:
                return False
            key, file, data = self._rng.choice(rows)
            if file is None:
                at = self._rng.randrange(len(data))
                spoilt = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
                db.execute("UPDATE artifacts SET data = ? WHERE key = ?", (spoilt, key))
            else:
                path = self._stack.state / "artifacts" / file
                with contextlib.suppress(FileNotFoundError), path.open("r+b") as out:
                    at = self._rng.randrange(path.stat().st_size)
                    out.seek(at)
                    byte = out.read(1)[0]
                    out.seek(at)
                    out.write(bytes([byte ^ 0x10]))
        return True


def leftovers(state: Path) -> list[str]:
    """Files in a stopped stack's folder that nothing accounts for."""
    with contextlib.closing(sqlite3.connect(state / "jobs.sqlite")) as db:
        known = {file for (file,) in db.execute("SELECT file FROM artifacts WHERE file IS NOT NULL")}
        unfinished = "('queued', 'text', 'denoise', 'vae')"
        stale = db.execute(
            "SELECT key FROM artifacts WHERE kind IN ('checkpoint', 'latents') AND substr(key, instr(key, '/') + 1)"
            f" NOT IN (SELECT id FROM jobs WHERE state IN {unfinished} OR state = 'failed')"
        ).fetchall()
    files = [str(path) for path in (state / "artifacts").iterdir() if path.name not in known]
    sockets = [str(path) for path in state.glob("stack.json")]
    return files + sockets + [key for (key,) in stale]
