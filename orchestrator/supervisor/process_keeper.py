"""Processes that are kept: started when they are due, started again when they have ended, ended in good order."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import NamedTuple

from orchestrator.supervisor.child import Child, Process
from orchestrator.supervisor.fork_server import ForkServer

GRACE_SECONDS = 8.0  # from asking a process to stop to killing it
STOPPED_SECONDS = 0.5  # that a process may stand still by a signal


class Ended(NamedTuple):
    """A process that has ended; `asked` if it was told to."""

    child: Child
    pid: int
    asked: bool


class ProcessKeeper:
    """`children` gives all that are to run, the fork server among them."""

    def __init__(self, forks: ForkServer, children: Callable[[], Iterable[Child]]) -> None:
        self.forks, self._children = forks, children
        self.leaving: list[tuple[Child, float]] = []  # scaled away or restarted, and monotonic seconds when to kill

    def start_due(self, started: Callable[[Child], None]) -> None:
        """Start what is to run and doesn't, when its time has come; kill what was to end and hasn't."""
        now = time.monotonic()
        self.forks.listen()
        self.forks.child.proven |= self.forks.ready
        for child in self._children():
            if child.state == "waiting" and child.wanted and now >= child.start_at:
                if child.forked and self.forks.starting:
                    continue  # it is there sooner than a process that imports everything by itself
                child.start(self._spawn)
                started(child)
        self.forks.keep_twin()
        for child, kill_at in self.leaving:
            if now >= kill_at:
                child.kill()

    def next_due(self) -> float | None:
        """Monotonic seconds when there is something to do without a message."""
        held = self.forks.starting
        children = [*self._children()]
        due = [c.start_at for c in children if c.state == "waiting" and c.wanted and not (c.forked and held)]
        due += [child.stopped + STOPPED_SECONDS for child in children if child.stopped]
        return min(due + [at for _, at in self.leaving], default=None)

    def _spawn(self, child: Child, report: int) -> Process | None:
        """Start a child by the fork server, which is itself followed by its twin; None: it has to start anew."""
        if child is self.forks.child:
            return self.forks.succeed()
        return self.forks.spawn(child, report) if child.forked else None

    def dismiss(self, child: Child) -> None:
        """End a process in good order."""
        child.terminate()
        if child.process is not None:
            self.leaving.append((child, time.monotonic() + GRACE_SECONDS))

    def restart(self, child: Child) -> None:
        """End a process in good order, so that another is started, whatever has kept it from that."""
        child.wanted, child.failures, child.start_at = True, 0, 0.0
        self.dismiss(child)

    def put_down_stopped(self) -> list[int]:
        """Kill processes that stand still by a signal, to be replaced; return their numbers."""
        now, pids = time.monotonic(), []
        for child in self._children():
            since = child.notice_stop()
            if since is not None and now - since >= STOPPED_SECONDS:
                child.put_down("it was stopped by a signal, and stood still")
                pids.append(child.process.pid if child.process else 0)
        return pids

    def reap(self) -> Iterator[Ended]:
        """Yield the processes that have ended since the last call."""
        for child in [*self._children(), *(child for child, _ in self.leaving)]:
            asked = child.state == "stopping"
            pid = child.reap()
            if pid is not None:
                if child is self.forks.child:
                    self.forks.lost()
                yield Ended(child, pid, asked)
        self.leaving = [(child, at) for child, at in self.leaving if child.process is not None]

    @staticmethod
    def end(groups: Iterable[Sequence[Child]]) -> None:
        """End groups of processes, one group after the other, in good order where they do it in time."""
        for group in groups:
            deadline = time.monotonic() + GRACE_SECONDS
            for child in group:
                child.terminate()
            for child in group:
                if child.process is not None:
                    with contextlib.suppress(Exception):
                        child.process.wait(max(0.1, deadline - time.monotonic()))
                child.kill()
            for child in group:
                if child.process is not None:
                    child.process.wait()


class Alarm:
    """Wakes a loop at signals: at those that end it, whose number it remembers, and when a child has ended."""

    def __init__(self) -> None:
        self.wake, self._bell = socket.socketpair()
        self.wake.setblocking(False)
        self._bell.setblocking(False)
        self.signal = 0

    @contextlib.contextmanager
    def heed_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._remember)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        yield
        signal.set_wakeup_fd(-1)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def ring(self) -> None:
        """Wake the loop, from any thread."""
        self._bell.send(b"!")

    def close(self) -> None:
        self.wake.close()
        self._bell.close()

    def hush(self) -> None:
        """Take in what has woken the loop."""
        with contextlib.suppress(BlockingIOError):
            self.wake.recv(4096)


class Lifeline:
    """A pipe of which every child holds the read end: only this process's death lets go of the other."""

    def __init__(self) -> None:
        self.read_end, self._life = os.pipe()

    def close(self) -> None:
        os.close(self._life)
        os.close(self.read_end)
