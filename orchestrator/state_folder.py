"""The folder of one stack: database, artifacts, sockets, logs, and the locks that keep a second stack out."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from protocol.client.endpoints import CPU_LOCK, LORAS, PUBLISHED, Endpoints
from protocol.curve_keys import DoorRole
from protocol.errors import Conflict, StateUnusable, TriptychError, WaitTimeout

OURS = re.compile(r"jobs(\.backup)?\.sqlite.*|artifacts|loras|logs|keys|sockets|stack\.json(\.new)?|\w+\.lock")
ARTIFACT = re.compile(r"(text|checkpoint|latents|pictures)-[0-9a-f]{24}")  # names of artifacts' files
END_SECONDS, LOOK_SECONDS = 60.0, 0.05  # that a stack may take for its end, and between two looks
LONGEST_IPC_PATH = 100  # sun_path holds 108 bytes on Linux, 104 on macOS


@dataclass(frozen=True, slots=True)
class StackFolder:
    path: Path

    def create(self) -> None:
        """Make the folder and its parts, private to the user; StateUnusable where it is somebody else's, or another's.

        A folder that is not empty and holds no stack is not taken: what lies there may be removed as rubbish of ours.
        """
        if self.path.is_dir() and not self.database.exists() and (strange := self._strangers()):
            raise StateUnusable(
                f"The folder {shortened(self.path)!r} holds {strange[0]!r} and no stack of Triptych's.",
                "Give an empty folder, or a new one, with --state DIR.",
            )
        self.make_parts()

    def make_parts(self) -> None:
        """Make what is missing of a folder that is this stack's; StateUnusable."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._check_owner(self.path, self.path.stat())
            for part in (self.artifacts, self.loras, self.logs):
                part.mkdir(exist_ok=True, mode=0o700)
            for part in (self.artifacts, self.loras, self.logs, self.keys, self.path / "sockets"):
                if part.exists() or part.is_symlink():
                    self._check_part(part)
            self.path.chmod(0o700)
        except OSError as error:
            raise StateUnusable(
                f"The state folder {shortened(self.path)!r} can't be used: {error.strerror}.",
                "Give another with --state DIR.",
            ) from error

    def _check_owner(self, path: Path, status: os.stat_result) -> None:
        if status.st_uid != os.geteuid():
            raise StateUnusable(
                f"{str(path)!r} belongs to another user.", "Give a folder of your own with --state DIR."
            )

    def _check_part(self, part: Path) -> None:
        status = part.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise StateUnusable(f"{str(part)!r} is a link or a file, not a folder of Triptych's.", "Move it away.")
        self._check_owner(part, status)

    def _strangers(self) -> list[str]:
        """List what lies in a folder without a database, and is not what a stack leaves there."""
        found = [p.name for p in self.path.iterdir() if not OURS.fullmatch(p.name) and not p.is_socket()]
        if self.artifacts.is_dir():
            found += [f"artifacts/{p.name}" for p in self.artifacts.iterdir() if not ARTIFACT.fullmatch(p.name)]
        return sorted(found)

    @property
    def database(self) -> Path:
        return self.path / "jobs.sqlite"

    @property
    def backup(self) -> Path:
        """The copy of the database, without artifacts."""
        return self.path / "jobs.backup.sqlite"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def loras(self) -> Path:
        """The folder where LoRAs lie by their digests: files that clients have sent, and links to others."""
        return self.path / LORAS

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def cpu_lock(self) -> Path:
        """The file that the worker that computes on the CPU locks."""
        return self.path / CPU_LOCK

    def log(self, process: str) -> Path:
        return self.logs / f"{process}.log"

    def socket_folder(self) -> Path:
        """A 0700 folder whose paths are short enough for ipc sockets."""
        inside = self.path.resolve() / "sockets"
        if len(str(inside)) + len("/door-client-in") <= LONGEST_IPC_PATH:
            folder = inside
        else:
            name = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
            folder = Path(tempfile.gettempdir()) / f"triptych-{os.getuid()}-{name}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
            raise TriptychError(
                f"The socket folder {str(folder)!r} belongs to somebody else.", "Remove it, or use --state."
            )
        folder.chmod(0o700)
        for path in (folder / "clients", folder / "workers"):
            if path.exists() and not path.is_socket():
                raise StateUnusable(f"{str(path)!r} is no socket of Triptych's.", "Move it away.")
        return folder

    def local_endpoints(self) -> Endpoints:
        folder = self.socket_folder()
        return Endpoints(f"ipc://{folder / 'clients'}", f"ipc://{folder / 'workers'}")

    def door_endpoint(self, role: DoorRole) -> str:
        """Return the endpoint where the door for a role comes to the orchestrator."""
        return f"ipc://{self.socket_folder() / f'door-{role}'}"

    def publish(self, endpoints: Endpoints, remote: Mapping[str, str]) -> None:
        """Let clients and workers find the running orchestrator; `remote` are its TCP endpoints by role."""
        text = json.dumps({**asdict(endpoints), "remote": dict(remote), "pid": os.getpid()})
        draft = self.path / f"{PUBLISHED}.new"
        try:
            draft.write_text(text)
            draft.replace(self.path / PUBLISHED)
        except OSError as error:
            raise StateUnusable(
                f"{str(draft)!r} can't be written: {error.strerror}.", "Make room on its disk."
            ) from error

    def withdraw(self) -> None:
        (self.path / PUBLISHED).unlink(missing_ok=True)

    def last_holder(self, role: str) -> int:
        """Return the process that holds the folder in a role, or was the last to do so; 0 if that isn't known."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            owner = (self.path / f"{role}.lock").read_text().strip()
            return int(owner) if owner.isdecimal() else 0
        return 0

    def lock(self, role: str) -> TextIO:
        """Hold the folder in a role until the returned file is closed or the process ends; Conflict if it is held."""
        try:
            file = (self.path / f"{role}.lock").open("a+")
        except OSError as error:
            raise StateUnusable(
                f"The state folder {str(self.path)!r} can't be written: {error.strerror}.",
                "Make it writable, or give another with --state DIR.",
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            owner = self.last_holder(role) or "unknown"
            raise Conflict(
                f"A stack is already running in {str(self.path)!r} ({role}, process {owner}).",
                "Use it as it is, stop it, or give another folder with --state DIR.",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file


def end_stack(folder: Path) -> bool:
    """Stop what runs in a stack's folder, and wait until it has ended; return whether anything did. WaitTimeout."""
    lock = folder / "supervisor.lock"
    if not lock.exists() or not is_held(lock):
        return False
    if owner := StackFolder(folder).last_holder("supervisor"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(owner, signal.SIGTERM)
    until = time.monotonic() + END_SECONDS
    while is_held(lock):
        if time.monotonic() > until:
            raise WaitTimeout(
                f"The stack, process {owner or 'unknown'}, has not stopped yet.", "Look at: triptych logs"
            )
        time.sleep(LOOK_SECONDS)
    return True


def is_held(lock: Path) -> bool:
    """Return whether a process holds a lock file."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def shortened(path: Path) -> str:
    """Return as much of a path as an error needs."""
    text = str(path)
    return text if len(text) <= 120 else f"{text[:100]}…"
