"""Artifacts, which stages leave: tensors under a kind and a name, until nobody needs them.

Small ones lie in the database, in the same transaction as the job that they belong to; large ones in files beside it,
on the disk before the row that names them. A file without a row is rubbish of a crash and removed at the next start.
All are checksummed: what is not as it was written counts as gone, and is made again.
"""

import logging
import math
import os
import stat
import zlib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgpack

from orchestrator.state_folder import ARTIFACT
from orchestrator.storage.database import Database
from protocol.errors import StateUnusable
from protocol.tensors import ITEMSIZE, Tensor, checked

log = logging.getLogger(__name__)

Kind = Literal["text", "checkpoint", "latents", "pictures", "input"]
KINDS: tuple[Kind, ...] = ("text", "checkpoint", "latents", "pictures", "input")
OF_A_JOB: tuple[Kind, ...] = ("checkpoint", "latents", "pictures")  # by its id; others are many jobs'
IN_PARTS: tuple[Kind, ...] = ("pictures",)
INLINE_BYTES = 128 << 10  # up to here SQLite is faster than a file of its own


class Artifacts:
    def __init__(self, database: Database, folder: Path) -> None:
        self._db, self._folder = database, folder
        self._unsafe: list[Path] = []  # files that may not be on the disk yet
        self._doomed: list[Path] = []  # files to remove once the transaction that let them go is safe
        rows: Any = database.read("SELECT kind, sum(bytes) FROM artifacts GROUP BY kind")
        sums: dict[str, int] = dict(rows)
        self.bytes_of: dict[str, int] = {kind: sums.get(kind, 0) for kind in KINDS}
        row: Any = database.first("SELECT max(used) FROM artifacts")
        self._clock: int = row[0] or 0  # of uses; no clock of the world, which may jump
        self._sweep()

    def _sweep(self) -> None:
        """Remove files that no row names: those alone that are ours by name, in a folder of our own."""
        status = self._folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return
        known = {name for (name,) in self._db.read("SELECT file FROM artifacts WHERE file IS NOT NULL")}
        for path in self._folder.iterdir():
            if path.name not in known and ARTIFACT.fullmatch(path.name) and stat.S_ISREG(path.lstat().st_mode):
                path.unlink(missing_ok=True)

    def make_safe(self) -> None:
        """See that files are on the disk, before the transaction that names them. StateUnusable: there is no room."""
        while self._unsafe:
            path = self._unsafe.pop()
            try:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise unwritable(path, error) from error

    def committed(self) -> None:
        """Remove the files that the transaction let go, once it is safe."""
        while self._doomed:
            self._doomed.pop().unlink(missing_ok=True)

    def put(self, kind: Kind, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep tensors under a name; what was there is replaced. StateUnusable: there is no room for them."""
        size = sum(t.nbytes for t in tensors)
        specs = msgpack.packb([t.spec for t in tensors])
        checksum = zlib.crc32(specs)
        for tensor in tensors:
            checksum = zlib.crc32(tensor.data, checksum)
        blob, file = None, None
        if size <= INLINE_BYTES:
            blob = b"".join(t.data for t in tensors)
        else:
            file = f"{kind}-{os.urandom(12).hex()}"
            self._write_file(path := self._folder / file, tensors)
            self._unsafe.append(path)
        values = (f"{kind}/{name}", kind, specs, blob, file, size, self._tick(), checksum)
        columns = "key, kind, specs, data, file, bytes, used, checksum"
        insert = f"INSERT OR IGNORE INTO artifacts({columns}) VALUES(?,?,?,?,?,?,?,?)"
        if not self._db.write(insert, values):
            self.drop(kind, name)
            self._db.write(insert, values)
        self.bytes_of[kind] += size

    @staticmethod
    def _write_file(path: Path, tensors: Sequence[Tensor]) -> None:
        """Write a new file; its folder is made again if somebody has removed it."""
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            with path.open("xb") as out:
                for tensor in tensors:
                    out.write(tensor.data)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise unwritable(path, error) from error

    def get(self, kind: Kind, name: str) -> tuple[Tensor, ...] | None:
        """The tensors under a name; None if there are none, or they are not what was written."""
        query = "SELECT specs, data, file, checksum FROM artifacts WHERE key = ?"
        row: Any = self._db.first(query, (f"{kind}/{name}",))
        if row is None:
            return None
        specs, blob, file, checksum = row
        if blob is None:
            try:
                blob = (self._folder / file).read_bytes()
            except OSError as error:
                log.error("%s of %s is gone: %s", kind, name, error)
                return None
        if checksum is not None and zlib.crc32(blob, zlib.crc32(specs)) != checksum:
            log.error("%s of %s is not what was written", kind, name)
            return None
        try:
            return tuple(_split(msgpack.unpackb(specs, use_list=False), memoryview(blob)))
        except Exception as error:  # only what has no checksum: of an earlier release
            log.error("%s of %s can't be read: %s", kind, name, error)
            return None

    def specs(self, kind: Kind, name: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return the name, dtype and shape of each tensor under a name, unread; none if there are none."""
        row: Any = self._db.first("SELECT specs FROM artifacts WHERE key = ?", (f"{kind}/{name}",))
        return list(msgpack.unpackb(row[0], use_list=False)) if row else []

    def has(self, kind: Kind, name: str) -> bool:
        return self._db.first("SELECT 1 FROM artifacts WHERE key = ?", (f"{kind}/{name}",)) is not None

    def touch(self, kind: Kind, name: str) -> None:
        """Count a use, so that what is used last is let go last."""
        self._db.write("UPDATE artifacts SET used = ? WHERE key = ?", (self._tick(), f"{kind}/{name}"))

    def put_part(self, kind: Kind, name: str, number: int, tensors: Sequence[Tensor]) -> None:
        """Keep a part of what lies under a name, from number 1 on; what lies there without a number is the first."""
        self.put(kind, part_name(name, number), tensors)

    def get_part(self, kind: Kind, name: str, number: int) -> tuple[Tensor, ...] | None:
        """Return `get`'s result of a part; part 0 is what lies there without a number."""
        return self.get(kind, part_name(name, number))

    def parts(self, kind: Kind, name: str) -> list[int]:
        """Return the numbers of the parts that are kept under a name, the first one left out; sorted."""
        query = "SELECT key FROM artifacts WHERE key > ? AND key < ?"
        rows: Any = self._db.read(query, (f"{kind}/{name}/", f"{kind}/{name}0"))  # "0" is what comes after "/"
        return sorted(int(key.rpartition("/")[2]) for (key,) in rows)

    def drop(self, kind: Kind, name: str) -> None:
        """Remove what lies under a name, with its parts."""
        if kind in IN_PARTS and "/" not in name:
            for number in self.parts(kind, name):
                self.drop(kind, part_name(name, number))
        key = f"{kind}/{name}"
        row: Any = self._db.first("SELECT file, bytes FROM artifacts WHERE key = ?", (key,))
        if row is None:
            return
        if row[0] is not None:
            self._doomed.append(self._folder / row[0])
        self._db.write("DELETE FROM artifacts WHERE key = ?", (key,))
        self.bytes_of[kind] -= row[1]

    def shrink(self, kind: Kind, limit: int, spare: Container[str] = ()) -> list[str]:
        """Let go of the longest unused until at most `limit` bytes are kept; the names that went."""
        gone: list[str] = []
        if self.bytes_of[kind] <= limit:
            return gone
        left = self.bytes_of[kind]
        rows: Any = self._db.read("SELECT key, bytes FROM artifacts WHERE kind = ? ORDER BY used", (kind,))
        for key, size in rows:
            if left <= limit:
                break
            name = key.split("/")[1]
            if name not in spare:
                left -= size
                gone.append(name)
        rows.close()
        gone = list(dict.fromkeys(gone))  # a part goes with all others
        for name in gone:
            self.drop(kind, name)
        return gone

    def names(self, kind: Kind) -> list[str]:
        return [
            str(key).split("/", 1)[1] for (key,) in self._db.read("SELECT key FROM artifacts WHERE kind = ?", (kind,))
        ]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def part_name(name: str, number: int) -> str:
    return f"{name}/{number}" if number else name


def unwritable(path: Path, error: OSError) -> StateUnusable:
    return StateUnusable(f"{str(path)!r} can't be written: {error.strerror}.", "Make room on its disk.")


def _split(specs: Sequence[tuple[str, str, tuple[int, ...]]], data: memoryview) -> Iterator[Tensor]:
    start = 0
    for name, dtype, shape in specs:
        end = start + math.prod(shape) * ITEMSIZE[dtype]
        yield checked((name, dtype, shape), data[start:end])
        start = end
