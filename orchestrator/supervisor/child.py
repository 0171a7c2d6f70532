"""One process of the supervisor's: how to start it, and what to do when it ends."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import psutil

from orchestrator.log_files import LOG_LIMIT, rotate
from protocol.process import LIFELINE, MOST_REPORTED, REPORT, ExitReport
from protocol.stages import Stage
from protocol.views import ProcessView

BACKOFF_SECONDS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
HEALTHY_SECONDS = 60.0  # after so long, or once it is known to work, the next failure counts as the first again
LOOK_AGAIN_SECONDS = 2.0  # whether what can't be used can be used again
UNRECOVERABLE = (2, 4, 5, 8)  # exit codes after which another try gives the same: usage, no model, no room, damage
MOST_KILLED = 5  # times by a signal, before it ever worked: for want of memory, say
MOST_REFUSED = 3  # times in a row that what once worked may say that it never can
NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")  # in reasons, which may differ where the reason is the same
UNUSABLE = 7  # exit code of what may be better later, but not if it was so from the start


class Process(Protocol):
    """The part of subprocess.Popen that is used."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass(slots=True)
class Child:
    name: str
    stage: Stage | None
    arguments: Sequence[str]  # of this Python, before the spec
    spec: str  # JSON of what it is to be; empty for the fork server
    log: Path
    lifeline: int  # the read end that the process gets
    environment: dict[str, str] = field(default_factory=dict)
    state: Literal["starting", "running", "stopping", "waiting"] = "waiting"
    restarts: int = 0
    reason: str = ""
    failures: int = 0
    start_at: float = 0.0  # monotonic seconds, while waiting
    started: float = 0.0
    wanted: bool = True
    exit_code: int = 0  # of the last end
    proven: bool = False  # it works: it has said so, or the orchestrator has
    ever_proven: bool = False  # it, or one before it
    forked: bool = False  # by the fork server, if there is one
    essential: bool = False  # started again after any end, once it has worked
    model: str = ""  # by its name in the stack; empty: it is of no model
    verdict: str = ""  # why it is being killed
    stopped: float = 0.0  # monotonic seconds, since when it stands still by a signal; 0: it doesn't
    process: Process | None = None
    report: ExitReport | None = None  # of the last end, where the process wrote one
    descriptors: tuple[int, ...] = ()  # that it gets besides
    log_limit: int = LOG_LIMIT
    prepare: Callable[[], None] | None = None  # called before it is started anew
    _report_end: int | None = None  # the pipe's read end for the present process's report

    def start(self, spawn: Callable[["Child", int], Process | None] | None = None) -> None:
        """Start it anew, or by `spawn` if that gives a process; it gets the write end of a pipe for its exit report."""
        self.rotate_log()
        self._report_end, report = os.pipe()
        os.set_blocking(self._report_end, False)
        try:
            self.process = (spawn(self, report) if spawn else None) or self._popen(report)
        finally:
            os.close(report)
        self.state, self.started, self.proven = "running", time.monotonic(), False

    def _popen(self, report: int) -> subprocess.Popen[bytes]:
        if self.prepare:
            self.prepare()
        with self.open_log() as log:
            return subprocess.Popen(
                [sys.executable, *self.arguments, *([self.spec] if self.spec else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(self.lifeline, report, *self.descriptors),
                start_new_session=True,
                umask=0o077,
                env={**os.environ, **self.environment, LIFELINE: str(self.lifeline), REPORT: str(report)},
            )

    def terminate(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.state = "stopping"
            self.process.terminate()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()

    def put_down(self, verdict: str) -> None:
        """Kill it, for a reason that is remembered."""
        self.verdict = f"killed: {verdict}"
        self.kill()

    def notice_stop(self) -> float | None:
        """Monotonic seconds since when it is stopped by a signal (SIGSTOP), so that it does nothing; else None."""
        if self.process is None:
            return None
        try:
            still = psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            still = False
        self.stopped = (self.stopped or time.monotonic()) if still else 0.0
        return self.stopped or None

    def reap(self) -> int | None:
        """The process number of a process that has just ended; the next start is planned, if one is wanted."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        pid, asked = self.process.pid, self.state == "stopping"
        self.process, self.exit_code, before = None, code, self.reason
        self.report = self._read_report()
        told = self.report.line if self.report else exit_reason(code, self.log)
        self.reason = "restarted on request" if asked else self.verdict or told
        self.verdict, self.stopped = "", 0.0
        if not asked:
            healthy = self.proven or time.monotonic() - self.started > HEALTHY_SECONDS
            self.failures = 1 if healthy else self.failures + 1
        if not asked and self._is_hopeless(code, before):
            self.wanted = False
        self.restarts += 1
        self.state = "waiting"
        self.start_at = time.monotonic() + (0.0 if asked else self.backoff())
        return pid

    def _read_report(self) -> ExitReport | None:
        """Return the report that the process wrote before it ended; None if it wrote none."""
        end, self._report_end = self._report_end, None
        if end is None:
            return None
        try:
            return ExitReport.read(os.read(end, MOST_REPORTED))
        except BlockingIOError:  # a process that it has forked holds the other end
            return None
        finally:
            os.close(end)

    def _is_hopeless(self, code: int, before: str) -> bool:
        """Return whether another start would end as this one, and the one `before`."""
        if code in UNRECOVERABLE:
            return not self.ever_proven or (not self.essential and self.failures >= MOST_REFUSED)
        if self.ever_proven:
            return False
        if code == UNUSABLE:
            return True
        same = self.restarts > 0 and NUMBERS.sub("#", self.reason) == NUMBERS.sub("#", before)
        return same and (code > 0 or self.failures >= MOST_KILLED)

    def backoff(self) -> float:
        if self.exit_code == UNUSABLE:
            return min(self.failures, LOOK_AGAIN_SECONDS)  # there may be room at any moment
        return BACKOFF_SECONDS[min(self.failures, len(BACKOFF_SECONDS)) - 1]

    def view(self) -> ProcessView:
        pid = self.process.pid if self.process else None
        return ProcessView(
            name=self.name, stage=self.stage, model=self.model, pid=pid, state=self.state, restarts=self.restarts,
            reason=self.reason,
        )  # fmt: skip

    def open_log(self) -> BinaryIO:
        """Open the log to append to; its folder is made again if somebody has removed it."""
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self.log.open("ab")

    def rotate_log(self) -> None:
        rotate(self.log, self.log_limit)


def exit_reason(code: int, log: Path) -> str:
    """Say why a process ended that left no report, with the last line of its log where it failed by itself."""
    if code < 0:
        return f"killed by signal {-code}"
    if code == 0:
        return "ended by itself"
    if not log.exists():
        return f"exit code {code}"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1][:500]}" if lines else f"exit code {code}"
