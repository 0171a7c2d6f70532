"""Weights page-locked in the mappings of their files, so that they pass to a GPU at the speed of its link.

Where memory holds all of them, all are locked, in the background. Where it doesn't, a part of a file is locked as it is
copied, as far as a limit allows: at once where it is streamed in every step; else once it has been copied some times,
until what is streamed needs the room. The rest is read from the disk whenever it is copied, past the page cache.
"""

import bisect
import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from workers.weights.direct_file import DirectFile
from workers.weights.host_weights import HostWeights, file_mappings, mapping_of, shared

log = logging.getLogger(__name__)

REGISTER_PORTABLE, REGISTER_READ_ONLY = 1, 8  # cudaHostRegister's flags: for every GPU; never written to
PIECE_BYTES = 512 << 20  # that are page-locked at a time; a multiple of any page's size
COPIES_BEFORE = 2  # of a piece, from the disk: what stays on a GPU is copied twice until a job has been learned from
LIMITED_PIECE_BYTES = 1 << 20  # where not all can be: what is streamed lies scattered


def register(address: int, size: int, device: torch.device) -> int:
    """Page-lock a part of a shared mapping in place, for a GPU or all; return the CUDA error, 0 for none."""
    flags = REGISTER_READ_ONLY | (REGISTER_PORTABLE if torch.cuda.device_count() > 1 else 0)
    with torch.cuda.device(device):
        return int(torch.cuda.cudart().cudaHostRegister(address, size, flags))


def unregister(address: int, device: torch.device) -> int:
    """Let go of what `register` has page-locked; return the CUDA error, 0 for none."""
    with torch.cuda.device(device):
        return int(torch.cuda.cudart().cudaHostUnregister(address))


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a tensor's bytes that lies in one piece of a file, or in none."""

    start: int
    end: int
    locked: bool
    file: DirectFile | None = None  # to be read from, in place of memory
    offset: int = 0  # in the file


@dataclass(slots=True)
class Piece:
    """A piece of a file in memory, from one address to another: it is locked, or refused, as a whole."""

    file: "LockedFile"
    start: int
    end: int
    locked: Future[bool] | None = None  # None: nobody has asked for it yet
    copied: int = 0  # bytes
    expected: set[int] = field(default_factory=set)  # by whom it will be copied again and again
    copying: int = 0  # copies from it that are not queued yet

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def again(self) -> bool:
        """Whether it will be copied again and again."""
        return bool(self.expected)

    @property
    def is_locked(self) -> bool:
        return self.locked is not None and self.locked.done() and self.locked.result()

    @property
    def is_due(self) -> bool:
        """Whether its turn to be locked is yet to come."""
        return self.locked is not None and not self.locked.done()

    def part(self, start: int, end: int, origin: int) -> Part:
        """Return the part from one address to another of a tensor that begins at address `origin`."""
        locked, file = self.file.ready(self)
        return Part(start - origin, end - origin, locked, file, start - self.file.address)


class LockedFile:
    """A shared mapping that is being page-locked for this process's life, by one of its GPUs, in the background.

    Pieces, so that the first can be on its way to the GPU while the last is still to be locked. What the driver
    refuses, with a message in the log, passes through a buffer instead.
    """

    def __init__(self, path: str, address: int, size: int, device: torch.device, locker: "PageLocker") -> None:
        self.address = address
        self._path, self.device, self._locker, self._refused = path, device, locker, False
        end, step = address + size, locker.piece_bytes
        self.pieces = [Piece(self, start, min(end, start + step)) for start in range(address, end, step)]
        # Opened now: later another file may have its path.
        self._direct = DirectFile(path) if locker.limit is not None else None
        if locker.limit is None:
            for piece in self.pieces:
                self._ask(piece)

    def expect_copy(self, piece: Piece, size: int) -> None:
        """Have a piece locked, of which bytes are about to be copied, where that is worth it and a limit allows it."""
        with self._locker.lock:  # several parts of a model may lie in one file
            if self._locker.limit is None:
                return
            piece.copied += size
            wanted = piece.locked is None and (piece.again or piece.copied > COPIES_BEFORE * piece.size)
            if not wanted or self._refused or not self._locker.take(piece.size, piece.again):
                return
            self._ask(piece)
        read_ahead(self._path, piece.start - self.address, piece.size)

    def ready(self, piece: Piece) -> tuple[bool, DirectFile | None]:
        """Return whether a piece is locked, once that has had its turn, and the file to read from if it isn't.

        It stays so until `copied`.
        """
        with self._locker.lock:
            piece.copying += 1
            turn = piece.locked
        if turn is not None and turn.result():
            return True, None
        return False, self._direct

    def _ask(self, piece: Piece) -> None:
        piece.locked = self._locker.thread.submit(self._page_lock, piece.start, piece.size)

    def copied(self, piece: Piece) -> None:
        """Note that a copy that `ready` was asked for is queued, or won't be."""
        with self._locker.lock:
            piece.copying -= 1

    def unlock(self, piece: Piece) -> bool:
        """Let go of a piece that is locked; return whether the driver did."""
        code = self._locker.unregister(piece.start, self.device)
        if code:
            log.warning("page-locked memory of %s was not given back (CUDA error %d)", self._path, code)
            self._clear_error()
            return False
        piece.locked = None
        return True

    def _clear_error(self) -> None:
        with contextlib.suppress(RuntimeError):  # the runtime keeps the error for the next launch: this one
            torch.zeros(1, device=self.device).add_(1)

    def _page_lock(self, start: int, size: int) -> bool:
        if self._refused:
            self._locker.give(size)
            return False
        code = self._locker.register(start, size, self.device)
        if code:
            self._refused = True
            self._locker.give(size)
            log.warning("page-locking %s was refused (CUDA error %d); copying through a buffer", self._path, code)
            self._clear_error()
        return not code


def read_ahead(path: str, offset: int, size: int) -> None:
    """Let a part of a file be read into the page cache in one go: locking it would else read page by page."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)


class PageLocker:
    """Page-locks files for this process's life, each once, in one thread: the driver locks for one at a time."""

    def __init__(
        self,
        register: Callable[[int, int, torch.device], int] = register,
        piece_bytes: int = PIECE_BYTES,
        limit: int | None = None,
        unregister: Callable[[int, torch.device], int] = unregister,
    ) -> None:
        self.register, self.unregister, self.piece_bytes, self.limit = register, unregister, piece_bytes, limit
        self.thread = ThreadPoolExecutor(1, "page-lock")
        self.lock = threading.RLock()  # of all that is noted of files and their pieces
        self.devices: set[torch.device] = set()  # GPUs that copy from them
        self._files: dict[int, LockedFile] = {}  # by address
        self._taken = 0  # bytes of the limit
        self.spare = False  # there may be pieces that others could make room for

    def restrict(self, limit: int) -> None:
        """Lock no more than so many bytes from now on; before any file."""
        self.limit, self.piece_bytes = limit, LIMITED_PIECE_BYTES

    def take(self, size: int, again: bool = False) -> bool:
        """Take bytes of the limit, if there is none or so many are left.

        For what will be copied `again` and again, others make room.
        """
        with self.lock:
            if again and self.spare and self.limit is not None and self._taken + size > self.limit:
                self._make_room()
            if self.limit is not None and self._taken + size > self.limit:
                return False
            self._taken += size
            self.spare = self.spare or not again
            return True

    def give(self, size: int) -> None:
        """Give back bytes of the limit that could not be locked."""
        with self.lock:
            self._taken -= size if self.limit is not None else 0

    def _make_room(self) -> None:
        """Let go of all that is locked and not copied again and again."""
        every = [piece for file in self._files.values() for piece in file.pieces]
        left = [piece for piece in every if not piece.again and (piece.is_locked or piece.is_due)]
        spare = [piece for piece in left if piece.is_locked and not piece.copying]
        self.spare = len(spare) < len(left)  # whose turn is yet to come
        if spare:
            for device in self.devices:
                torch.cuda.synchronize(device)  # nothing may be on its way from there
            let_go = [piece for piece in spare if piece.file.unlock(piece)]
            self._taken -= sum(piece.size for piece in let_go)
            log.info("%d pieces of files are not page-locked any more: others are copied more often", len(let_go))

    def file(self, path: str, address: int, size: int, device: torch.device) -> LockedFile:
        """Return a file's page-locked mapping, made once in a process, for all its GPUs."""
        with self.lock:
            if address not in self._files:
                self._files[address] = LockedFile(path, address, size, device, self)
            return self._files[address]

    def lock_ahead(self, paths: Iterable[Path], device: torch.device) -> None:
        """Begin to page-lock files that are about to be loaded as they are, in mappings that loading will recognise."""
        if self.limit is not None:
            return
        found = {
            (path, inode): file
            for path in map(os.path.realpath, paths)
            if (file := shared(path, inode := os.stat(path).st_ino)) is not None
        }
        mappings = file_mappings()
        for (path, inode), file in sorted(found.items(), key=lambda item: item[1].data_ptr()):
            mapping = mapping_of(file, mappings)  # some file systems tell other numbers there
            if mapping and (mapping.path, mapping.inode) == (path, inode):
                self.file(path, file.data_ptr(), file.nbytes, device)


PAGE_LOCKER = PageLocker()  # the process's own


class PageLocks:
    """The weights of a module that are page-locked, or will be."""

    def __init__(self, weights: HostWeights, device: torch.device, locker: PageLocker = PAGE_LOCKER) -> None:
        """Private weights become page-locked copies at once; mapped ones are locked in place, in the background."""
        self.limited, self._locker = locker.limit is not None, locker
        if device.type == "cuda":
            locker.devices.add(device)
        for name in weights.private:
            if locker.take(size := weights.tensors[name].nbytes):
                try:
                    weights.tensors[name] = weights.tensors[name].pin_memory()
                except BaseException:
                    locker.give(size)
                    raise
        self._pieces: list[Piece] = []
        for path, file in sorted(weights.files.items(), key=lambda item: item[1].data_ptr()):  # as swapping in goes
            self._pieces += locker.file(path, file.data_ptr(), file.nbytes, device).pieces

    def expect(self, tensors: Iterable[torch.Tensor]) -> None:
        """Lock the pieces that these weights lie in, and no others, as soon as they are copied: it happens again."""
        with self._locker.lock:
            self._locker.spare = True
            for piece in self._pieces:
                piece.expected.discard(id(self))
            for tensor in tensors:
                for piece in self._pieces_of(tensor):
                    piece.expected.add(id(self))

    def _pieces_of(self, tensor: torch.Tensor) -> Iterator[Piece]:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        index = max(0, bisect.bisect_right(self._pieces, start, key=lambda piece: piece.start) - 1)
        for piece in itertools.takewhile(lambda piece: piece.start < end, self._pieces[index:]):
            if piece.end > start:
                yield piece

    def parts(self, tensor: torch.Tensor) -> Iterator[Part]:
        """Yield a contiguous weight's bytes in parts that may be copied, each once its locking has had its turn."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        pieces = [(piece, max(piece.start, start), min(piece.end, end)) for piece in self._pieces_of(tensor)]
        for piece, first, last in pieces:
            piece.file.expect_copy(piece, last - first)
        for piece, first, last in pieces:
            part = piece.part(first, last, start)
            try:
                yield part
            finally:
                piece.file.copied(piece)
        if not pieces:  # a private one
            yield Part(0, tensor.nbytes, True)
