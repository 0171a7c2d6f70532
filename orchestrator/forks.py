"""The supervisor's side of the fork server: a child like others, which starts workers at once."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import sys
from pathlib import Path

import msgpack

from orchestrator.child import Child
from protocol.process import PID

PR_SET_CHILD_SUBREAPER = 36


class Forked:
    """A process that is not this one's by birth, but by adoption; as subprocess.Popen, as far as it is used."""

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
    """Starts a process that imports everything once. Until it is `ready`, and where it is gone, it starts nothing."""

    def __init__(self, log: Path, lifeline: int) -> None:
        self.child = Child("forkserver", None, [], log, lifeline)
        self.child.prepare = self._connect
        self.ready = False
        self.link: socket.socket | None = None
        self._far_end: socket.socket | None = None

    @staticmethod
    def possible() -> bool:
        """Whether this system can hand a grandchild over to its supervisor; asks it to."""
        return sys.platform == "linux" and bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)

    @property
    def starting(self) -> bool:
        return self.child.state == "running" and not self.ready

    def _connect(self) -> None:
        """Before each start of the child: a new pair of sockets."""
        self.close()
        self.link, self._far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptor = self._far_end.fileno()
        self.child.arguments = ["-m", "workers.forkserver", str(descriptor)]
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

    def spawn(self, child: Child) -> Forked | None:
        """A worker's process; None if the server is gone."""
        if not self.ready or self.link is None:
            return None
        request = msgpack.packb([list(child.arguments[2:]), child.environment])
        try:
            with child.log.open("ab") as log:
                socket.send_fds(self.link, [request], [log.fileno(), child.lifeline])
            self.link.settimeout(5.0)
            return Forked(PID.unpack(self.link.recv(PID.size))[0])
        except (OSError, struct.error):
            self.lost()
            return None

    def lost(self) -> None:
        self.ready = False

    def close(self) -> None:
        self.lost()
        for end in (self.link, self._far_end):
            if end is not None:
                end.close()
        self.link = self._far_end = None
