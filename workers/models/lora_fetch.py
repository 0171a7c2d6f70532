"""The folder where a worker finds LoRAs by their digests; what isn't there it may get from the stack, part by part."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

PREFIX = "triptych-loras-"
MOST_BYTES = 8 << 30  # of fetched files
DIGEST = re.compile(r"[0-9a-f]{64}")

Part = tuple[int, bytes]  # bytes of the whole file, 0 where it isn't there; and those from an offset on
Fetch = Callable[[str, int], Part]  # by digest and offset


class LoraFolder:
    """`folder` is the stack's own, where this worker can read it; `fetch` asks the stack for a part of a file."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.fetch: Fetch | None = None
        self._fetched: Path | None = None  # a folder of this process's

    def path(self, digest: str) -> Path | None:
        """Return a file's path; None where it can't be had."""
        if not DIGEST.fullmatch(digest):
            return None
        for folder in (self.folder, self._fetched):
            if folder and (path := folder / f"{digest}.safetensors").exists():
                with contextlib.suppress(OSError):
                    os.utime(path, follow_symlinks=False)
                return path
        return self._get(digest) if self.fetch else None

    def _get(self, digest: str) -> Path | None:
        """Fetch a file from the stack."""
        assert self.fetch is not None
        size, part = self.fetch(digest, 0)
        if not size:
            return None
        folder = self._own_folder()
        self._shrink(folder, MOST_BYTES - size)
        draft = folder / f"{digest}.part"
        with draft.open("wb") as file:
            file.write(part)
            while file.tell() < size:
                _, part = self.fetch(digest, file.tell())
                if not part:
                    return None
                file.write(part)
        return draft.rename(folder / f"{digest}.safetensors")

    def _own_folder(self) -> Path:
        if self._fetched is None:
            remove_left_overs()
            self._fetched = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        return self._fetched

    @staticmethod
    def _shrink(folder: Path, most: int) -> None:
        """Remove the files that were used longest ago, beyond so many bytes."""
        files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
        sizes = {path: path.stat().st_size for path in files}
        for path in files:
            if sum(sizes.values()) > most:
                path.unlink()
                del sizes[path]


def remove_left_overs() -> None:
    """Remove what processes that were killed have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        number = folder.name.removeprefix(PREFIX).partition("-")[0]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(folder, ignore_errors=True)
