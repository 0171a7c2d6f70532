"""What every process of a stack does at its start: say who it is in its log, and end when its supervisor ends."""

import ctypes
import logging
import os
import signal
import struct
import sys
import threading
import time

LIFELINE = "TRIPTYCH_LIFELINE"  # a pipe's read end; the supervisor holds the other, and only death lets go of it
PR_SET_PDEATHSIG = 1
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
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return f"{when} {self._process} {record.levelname} job={job} {text}"


def log_to_stderr(process: str, level: int = logging.INFO) -> None:
    """The supervisor leads stderr into the process's file, where a crash's last words land too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(process))
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
