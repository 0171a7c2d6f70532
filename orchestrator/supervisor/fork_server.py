"""The supervisor's side of what starts workers at once: a fork server, or a spare process where that is impossible."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import msgpack

from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.child import Child, Process
from protocol.process import PID
from protocol.views import ProcessView

PR_SET_CHILD_SUBREAPER = 36
ANSWER_SECONDS = 5.0  # for a fork
AFTER_SECONDS = 10.0  # that a spare process leaves to the first workers


class Forked:
    """A process that is this one's child by adoption, not by birth; as subprocess.Popen, as far as it is used."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """The exit code, or minus the signal's number; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                os.close(self._handle)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code once there is one; TimeoutError."""
        if self.poll() is None:
            ended, _, _ = select.select([self._handle], [], [], timeout)
            if not ended:
                raise TimeoutError
        code = self.poll()
        assert code is not None
        return code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)


class ForkServer:
    """Starts a process that imports everything once. Until it is `ready`, and where it is gone, it starts nothing.

    It has a twin, forked from it, which takes its place at once.
    """

    name = "forkserver"
    flags: tuple[str, ...] = ()
    kind = socket.SOCK_SEQPACKET

    def __init__(self, log: Path, lifeline: int) -> None:
        self.child = Child(self.name, None, [], "", log, lifeline)
        self.child.prepare = self._connect
        self.ready = False
        self.link: socket.socket | None = None
        self._far_end: socket.socket | None = None
        self._twin: tuple[Forked, socket.socket] | None = None

    @staticmethod
    def possible() -> bool:
        """Ask this system to give grandchildren to their supervisor; return whether it can. TRIPTYCH_FORK=0 says no."""
        return (
            os.environ.get("TRIPTYCH_FORK") != "0"
            and sys.platform == "linux"
            and bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
        )

    def start_ahead(self) -> None:
        """Start it before anything else: its imports take longer than all that comes before the first worker."""
        self.child.start()

    @property
    def starting(self) -> bool:
        return self.child.state == "running" and not self.ready

    def _connect(self) -> None:
        """Make a new pair of sockets, before each start of the child."""
        self._hang_up()
        self.link, self._far_end = socket.socketpair(socket.AF_UNIX, self.kind)
        descriptor = self._far_end.fileno()
        self.child.arguments = ["-m", "workers.runtime.fork_server", str(descriptor), *self.flags]
        self.child.descriptors = (descriptor,)

    def listen(self) -> None:
        """Take its word that it is ready, if it has come; call often."""
        if self.link is None:
            return
        if self._far_end is not None and self.child.process is not None:
            self._far_end.close()
            self._far_end = None
        if not self.ready and self.child.state == "running":
            with contextlib.suppress(BlockingIOError, ConnectionError):
                self.ready = len(self.link.recv(PID.size, socket.MSG_DONTWAIT)) == PID.size

    def keep_twin(self) -> None:
        """See that there is a twin; call often."""
        if self._twin and self._twin[0].poll() is not None:
            self._twin[1].close()
            self._twin = None
        if self._twin or not self.ready or self.link is None:
            return
        near, far = socket.socketpair(socket.AF_UNIX, self.kind)
        try:
            socket.send_fds(self.link, [msgpack.packb([b"", {}])], [far.fileno()])
            self.link.settimeout(ANSWER_SECONDS)
            self._twin = Forked(PID.unpack(self.link.recv(PID.size))[0]), near
        except (OSError, struct.error):
            near.close()
            self._give_up()
        finally:
            far.close()

    def succeed(self) -> Process | None:
        """Put the twin in its place and return it; None if there is none."""
        if self._twin is None:
            return None
        self._hang_up()
        (process, self.link), self._twin = self._twin, None
        return process

    def spawn(self, child: Child, report: int) -> Process | None:
        """Fork a worker's process, which gets the write end `report`; None if the server is gone."""
        if not self.ready or self.link is None:
            return None
        request = msgpack.packb([child.spec.encode(), child.environment])
        try:
            with child.open_log() as log:
                socket.send_fds(self.link, [request], [log.fileno(), child.lifeline, report])
            return self._started(self.link)
        except (OSError, struct.error):
            self._give_up()
            return None

    def _give_up(self) -> None:
        """Kill the server: it forks nothing, or too late, so that its answers can no longer be told apart."""
        self.child.put_down("it did not fork")
        self.lost()

    def _started(self, link: socket.socket) -> Process | None:
        link.settimeout(ANSWER_SECONDS)
        return Forked(PID.unpack(link.recv(PID.size))[0])

    def view(self) -> ProcessView:
        view = self.child.view()
        return view.model_copy(update={"state": "starting"}) if view.pid and not self.ready else view

    def lost(self) -> None:
        self.ready = False

    def close(self) -> None:
        self._hang_up()
        if self._twin:
            process, link = self._twin
            process.kill()
            process.wait()
            link.close()
            self._twin = None

    def end(self) -> None:
        """End its process, of a stack that does not come to be."""
        self.child.kill()
        if self.child.process is not None:
            self.child.process.wait()
        self.close()

    def _hang_up(self) -> None:
        self.lost()
        for end in (self.link, self._far_end):
            if end is not None:
                end.close()
        self.link = self._far_end = None


class Spare(ForkServer):
    """A process that has imported everything, waits for the next worker to be started, and becomes it.

    It comes once the workers of a new stack have started by themselves, which they do side by side.
    """

    name = "spare"
    flags = ("--spare",)
    kind = socket.SOCK_STREAM  # one request, in one piece; not every system has another kind

    def __init__(self, log: Path, lifeline: int) -> None:
        super().__init__(log, lifeline)
        self.child.start_at = time.monotonic() + AFTER_SECONDS

    def start_ahead(self) -> None:
        """Do nothing: workers that start by themselves come first."""

    @property
    def starting(self) -> bool:
        """Return False: no child waits for it."""
        return False

    def keep_twin(self) -> None:
        """Do nothing: a spare process forks nothing."""

    def _started(self, link: socket.socket) -> Process | None:
        process, self.child.process = self.child.process, None
        self.child.state, self.child.start_at = "waiting", time.monotonic()
        self.lost()
        return process


def new_fork_server(folder: StackFolder, lifeline: int) -> ForkServer:
    """Return what starts workers at once on this system."""
    kind = ForkServer if ForkServer.possible() else Spare
    return kind(folder.log(kind.name), lifeline)
