"""The contract of a process with its supervisor: what it logs, that it ends with it, and how it tells why it ends."""

import contextlib
import ctypes
import logging
import os
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable

from pydantic import ValidationError

from protocol.data import Data
from protocol.errors import TriptychError, from_wire
from protocol.visible import visible

LIFELINE = "TRIPTYCH_LIFELINE"  # a pipe's read end; the supervisor holds the other, and only death lets go of it
REPORT = "TRIPTYCH_REPORT"  # a pipe's write end, for an ExitReport
PR_SET_PDEATHSIG = 1
MOST_REPORTED = 16_384  # bytes of a report
PID = struct.Struct("!q")  # a process number, as the fork server tells it


class _Line(logging.Formatter):
    """`2026-11-22T20:15:03.123Z denoise-1 INFO job=3f2a… text`."""

    converter = staticmethod(time.gmtime)

    def __init__(self, process: str) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S")
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        when = f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d}Z"
        job = getattr(record, "job", "-")
        text = visible(record.getMessage())  # what a peer calls itself can't look like another line
        if record.exc_info:
            text += "\n" + visible(self.formatException(record.exc_info), keep="\n\t")
        return f"{when} {self._process} {record.levelname} job={job} {text}"


MOST_KINDS = 1000  # of lines that are remembered


class OnceASecond(logging.Filter):
    """Lets a line of each kind through once a second, with how many more there were; those of jobs are as many as jobs.

    So that nothing that a peer does can fill a disk.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}  # monotonic seconds, by the line without its values
        self._more: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if hasattr(record, "job"):
            return True
        kind, now = str(record.msg), time.monotonic()
        if now - self._last.get(kind, -1.0) < 1.0:
            self._more[kind] = self._more.get(kind, 0) + 1
            return False
        if len(self._last) >= MOST_KINDS:
            self._last = {kind: last for kind, last in self._last.items() if now - last < 1.0}
        self._last[kind] = now
        if more := self._more.pop(kind, 0):
            record.msg, record.args = f"{record.getMessage()} ({more} more like it)", None
        return True


def log_to_stderr(process: str, level: int = logging.INFO, limited: bool = False) -> None:
    """Log to stderr, which the supervisor leads into the process's file, where a crash's last words land too.

    With `limited`, lines of a kind come once a second: for processes that peers speak to.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(process))
    if limited:
        handler.addFilter(OnceASecond())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("torchao").setLevel(logging.ERROR)  # names each of its kernels that this machine can't use


def end_with_parent() -> None:
    """Die when the supervisor dies, however it dies; nothing happens in a process that has none."""
    lifeline = os.environ.pop(LIFELINE, None)
    if lifeline is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(int(lifeline),), daemon=True, name="lifeline").start()


def _watch(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written: this returns when the last holder of the other end is gone
    os._exit(1)


class ExitReport(Data):
    """The reason why a process ended by itself, written by it before it ends."""

    code: str  # of an error in errors.py, or "crash"
    message: str
    hint: str = ""

    @property
    def line(self) -> str:
        """The report in one line, for a person."""
        return f"{self.message} {self.hint}".strip()

    def error(self) -> TriptychError:
        """The error that ended the process."""
        return from_wire(self.code, self.message, self.hint)

    @staticmethod
    def read(data: bytes) -> "ExitReport | None":
        """The report in what came through a pipe; None where there is none."""
        try:
            return ExitReport.model_validate_json(data) if data else None
        except ValidationError:
            return None


def run_process(name: str, work: Callable[[str], None]) -> int:
    """Be a process of the supervisor's, started with its spec as JSON, which `work` gets; return the exit code."""
    end_with_parent()
    log_to_stderr(name, limited=True)
    os.umask(0o077)
    try:
        work(sys.argv[1])
    except BaseException as error:
        return report_end(error)
    return 0


def report_end(error: BaseException) -> int:
    """Tell the log and the supervisor why this process ends; the exit code.

    An error that a person can mend is one line; anything else has its traceback in the log.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, TriptychError):
        print(f"Error: {visible(str(error))}", file=sys.stderr, flush=True)
        report, code = ExitReport(code=error.code, message=error.message, hint=error.hint), error.exit_code
    else:
        traceback.print_exception(error)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        report, code = ExitReport(code="crash", message=text[:500]), 1
    _send(report)
    return code


def _send(report: ExitReport) -> None:
    descriptor = os.environ.get(REPORT)
    if descriptor is None:
        return
    with contextlib.suppress(OSError, ValueError):
        os.write(int(descriptor), report.model_dump_json().encode()[:MOST_REPORTED])
