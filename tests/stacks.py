"""Real stacks for tests: a supervisor in a process of its own, a client, and a clean end."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.access import KeyFolder
from protocol.client.client import Client
from protocol.curve_keys import save
from protocol.job import Job
from tests.tiny import environment

TRIPTYCH = [sys.executable, "-m", "orchestrator.cli"]


@dataclass
class RunningStack:
    folder: Path
    process: subprocess.Popen[str]
    client: Client
    http: str = ""  # address, where it serves HTTP

    def picture(self, prompt: str, **options: object) -> tuple[Job, torch.Tensor]:
        """Submit, wait, fetch: the job and its pictures, uint8 (n, height, width, 3)."""
        job = self.client.wait(self.client.submit(prompt, **options).id, timeout=120)
        return self.client.job(job.id), self.pictures(job.id)

    def pictures(self, job_id: str) -> torch.Tensor:
        tensor = self.client.raw_pictures(job_id)[1]
        return torch.frombuffer(bytearray(tensor.data), dtype=torch.uint8).reshape(tensor.shape)


@contextlib.contextmanager
def running_stack(
    folder: Path, *arguments: str, there: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[RunningStack]:
    """`triptych up` with its workers ready, run `there`; stopped at the end, and it must stop cleanly."""
    env = env or environment()
    running: RunningStack | None = None
    process = subprocess.Popen(
        [*there, *TRIPTYCH, "up", "--state", str(folder), "--json", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the stack ended: {logs(folder)}"
        told = json.loads(line)
        assert told["state"] == str(folder)
        with Client(folder, timeout=30) as client:
            running = RunningStack(folder, process, client, told.get("http", ""))
            yield running
    finally:
        process = running.process if running else process  # a test may have put another in its place
        if there:  # a signal ends what leads there, not what runs there
            subprocess.run([*there, *TRIPTYCH, "down", "--state", str(folder)], env=env, check=False, timeout=60)
        else:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0, logs(folder)


@contextlib.contextmanager
def joined_host(
    folder: Path, key: Path, *arguments: str, there: Sequence[str] = (), command: Sequence[str] = TRIPTYCH
) -> Iterator["subprocess.Popen[str]"]:
    """`triptych join` with a key, run `there`; stopped at the end, if it has not ended before."""
    process = subprocess.Popen(
        [*there, *command, "join", str(key), "--folder", str(folder), *arguments],
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def host_key(state: Path, name: str, endpoint: str, folder: Path) -> Path:
    """Let a host in; return the file of its key, in a folder."""
    path = folder / f"{name}.key"
    save(path, KeyFolder(state / "keys").issue(name, "host", endpoint))
    return path


def remote_endpoint(state: Path) -> str:
    """Return where a stack listens for workers and hosts."""
    return published(state, "worker")


def published(state: Path, role: str) -> str:
    """Return where a stack listens for peers of a role."""
    return str(json.loads((state / "stack.json").read_text())["remote"][role])


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted((folder / "logs").glob("*.log")))


def triptych(*arguments: str, folder: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line, as a person runs it."""
    state: Sequence[str] = ["--state", str(folder)] if folder else []
    return subprocess.run(
        [*TRIPTYCH, *arguments, *state],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        cwd=cwd,
        check=False,
    )
