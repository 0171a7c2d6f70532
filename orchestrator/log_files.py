"""Logs of processes: files that are put aside once they are long."""

import contextlib
import os
import shutil
from pathlib import Path

LOG_LIMIT = 10_000_000  # bytes; a longer one is put aside


def rotate(path: Path, limit: int = LOG_LIMIT) -> None:
    """Put a long log aside; a process that has it open goes on writing to the same file, which is empty then."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > limit:
            shutil.copyfile(path, path.with_suffix(".log.1"))
            os.truncate(path, 0)


def append(path: Path, text: str) -> None:
    """Add lines of another host's process to the log that is kept of it here; a disk that is full keeps none."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "a", encoding="utf-8") as file:
            file.write(text)
    rotate(path)


class LogTail:
    """Reads what is added to a log from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def more(self, most: int) -> str:
        """Return whole lines that have been added, at most so many bytes of them; empty where there are none."""
        try:
            size = self._path.stat().st_size
            if size < self._offset:
                self._offset = 0  # it was put aside
            if size == self._offset:
                return ""
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(most)
        except OSError:
            return ""
        whole = data.rfind(b"\n") + 1 or (len(data) if len(data) == most else 0)
        self._offset += whole
        return data[:whole].decode(errors="replace")
