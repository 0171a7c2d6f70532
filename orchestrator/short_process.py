"""Processes that find one answer and end, for what takes torch and a model's classes to find."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence

from protocol.errors import TriptychError
from protocol.process import MOST_REPORTED, REPORT, ExitReport


class EndedWithoutAnswer(TriptychError):
    """The process crashed, or was killed."""


def answer_of(module: str, arguments: Sequence[str]) -> bytes:
    """Run a module to its end, and return what it wrote to stdout.

    Raises:
        The error that its exit report names.
        EndedWithoutAnswer: it ended otherwise; with the report of its crash, or else its log's last line.
    """
    read_end, report = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], capture_output=True, check=False, pass_fds=(report,),
            env=os.environ | {REPORT: str(report)},
        )  # fmt: skip
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(report)
    os.set_blocking(read_end, False)
    found = b""
    with open(read_end, "rb", buffering=0) as pipe, contextlib.suppress(BlockingIOError):
        found = pipe.read(MOST_REPORTED) or b""
    if done.returncode == 0:
        return done.stdout
    told = ExitReport.read(found)
    if told and told.code != "crash":
        raise told.error()
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    raise EndedWithoutAnswer(told.line if told else last[0][:500])
