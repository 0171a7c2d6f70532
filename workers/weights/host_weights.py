"""A module's weights where loading left them: in the checkpoint's files, mapped, shared by all that map them.

`from_pretrained` keeps a parameter in a private mapping of its file if nothing had to be cast or converted.
Page-locking a private mapping would copy it, page by page, so the file is mapped a second time, shared and read-only:
the same pages of the page cache, page-locked in place. They pass to a GPU at the speed of the link, and are never
copied back.
"""

import bisect
import contextlib
import functools
import itertools
import logging
import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from protocol.units import format_bytes
from workers.weights.sharded import LocalPart

log = logging.getLogger(__name__)

REGISTER_PORTABLE, REGISTER_READ_ONLY = 1, 8  # cudaHostRegister's flags: for every GPU; never written to
PIECE_BYTES = 512 << 20  # that are page-locked at a time; a multiple of any page's size


@dataclass(frozen=True, slots=True)
class HostWeights:
    """Parameters in host memory by their names in the module; those that are shared come once."""

    tensors: dict[str, torch.Tensor]
    files: dict[str, torch.Tensor]  # by path, the mappings, flat uint8, that those lie in which are not private
    private: frozenset[str]  # names of copies that this process holds for itself

    @property
    def private_bytes(self) -> int:
        return sum(self.tensors[name].nbytes for name in self.private)


@dataclass(frozen=True, slots=True, order=True)
class Mapping:
    """A part of a file in this process's memory."""

    start: int  # addresses
    end: int
    offset: int  # of the start in the file
    path: str
    inode: int


def host_weights(module: torch.nn.Module, name: str, mine: Callable[[str], bool] = lambda _: True) -> HostWeights:
    """The weights of a module on the CPU, moved to shared mappings of their files where they lie in files.

    Says once in the log how much of them is a private copy. Parameters whose names are not `mine` are left alone.
    """
    tensors: dict[str, torch.Tensor] = {}
    private: set[str] = set()
    files: dict[str, torch.Tensor] = {}
    mappings = file_mappings()
    own = {key: parameter for key, parameter in plain_parameters(module).items() if mine(key)}
    for key, parameter in own.items():
        tensor = tensors[key] = parameter.data
        found = mapping_of(tensor, mappings)
        file = shared(found.path, found.inode) if found else None
        if found and file is not None and (found.offset - found.start) % tensor.element_size() == 0:
            files[found.path] = file
            start = found.offset + tensor.data_ptr() - found.start
            part = file[start : start + tensor.nbytes]
            tensors[key] = part.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        elif tensor.nbytes:
            private.add(key)
    weights = HostWeights(tensors, files, frozenset(private))
    if private:
        log.info(
            "%s of %s's weights are a private copy: a cast or conversion made it",
            format_bytes(weights.private_bytes), name,
        )  # fmt: skip
    for key, parameter in own.items():
        parameter.data = tensors[key]
    return weights


def plain_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | LocalPart]:
    """Return a module's parameters but for quantized ones, which are no single piece of memory."""
    found: dict[str, torch.nn.Parameter | LocalPart] = {}
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            found[name] = LocalPart(parameter)
        elif type(parameter.data) is torch.Tensor:
            found[name] = parameter
    return found


def mapping_of(tensor: torch.Tensor, mappings: Sequence[Mapping]) -> Mapping | None:
    """The one of sorted mappings that a tensor lies in."""
    index = bisect.bisect_right(mappings, tensor.data_ptr(), key=lambda mapping: mapping.start) - 1
    found = mappings[index] if index >= 0 and tensor.nbytes else None
    return found if found and tensor.data_ptr() + tensor.nbytes <= found.end else None


def file_mappings() -> list[Mapping]:
    """Mapped safetensors files, sorted, neighbouring parts of one file joined; none where /proc doesn't tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found: list[Mapping] = []
    for line in lines:
        fields = line.split(maxsplit=5)
        # A hub cache links its snapshots to blobs whose names have no suffix.
        if len(fields) == 6 and (fields[5].endswith(".safetensors") or "/blobs/" in fields[5]):
            start, end = (int(part, 16) for part in fields[0].split("-"))
            part = Mapping(start, end, int(fields[2], 16), fields[5], int(fields[4]))
            last = found[-1] if found else None
            if last and (last.end, last.inode, last.offset + last.end - last.start) == (start, part.inode, part.offset):
                part = Mapping(last.start, end, last.offset, last.path, last.inode)
                found.pop()
            found.append(part)
    return found


@functools.cache
def shared(path: str, inode: int) -> torch.Tensor | None:
    """A file, mapped shared and read-only for this process's life: a page-locked address is never another file's.

    None if another file has taken its path.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            if os.fstat(file.fileno()).st_ino != inode:
                return None
            memory = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(memory, dtype=torch.uint8)
    except OSError:
        return None


def register(address: int, size: int, device: torch.device) -> int:
    """Page-lock a part of a shared mapping in place, for a GPU or all; return the CUDA error, 0 for none."""
    flags = REGISTER_READ_ONLY | (REGISTER_PORTABLE if torch.cuda.device_count() > 1 else 0)
    with torch.cuda.device(device):
        return int(torch.cuda.cudart().cudaHostRegister(address, size, flags))


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a tensor's bytes that lies in one piece of locked memory, or in none."""

    start: int
    end: int
    locked: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a file in memory, from one address to another: it is locked, or refused, as a whole."""

    start: int
    end: int
    locked: Future[bool]


class LockedFile:
    """A shared mapping that is being page-locked for this process's life, by one of its GPUs, in the background.

    Pieces, so that the first can be on its way to the GPU while the last is still to be locked. What the driver
    refuses, with a message in the log, passes through a buffer instead.
    """

    def __init__(self, path: str, address: int, size: int, device: torch.device, locker: "PageLocker") -> None:
        self._path, self._device, self._register, self._refused = path, device, locker.register, False
        end, step = address + size, locker.piece_bytes
        self.pieces = [
            Piece(start, stop := min(end, start + step), locker.thread.submit(self._lock, start, stop - start))
            for start in range(address, end, step)
        ]

    def _lock(self, start: int, size: int) -> bool:
        if self._refused:
            return False
        code = self._register(start, size, self._device)
        if code:
            self._refused = True
            log.warning("page-locking %s was refused (CUDA error %d); copying through a buffer", self._path, code)
            with contextlib.suppress(RuntimeError):  # the runtime keeps the error for the next launch: this one
                torch.zeros(1, device=self._device).add_(1)
        return not code


class PageLocker:
    """Page-locks files for this process's life, each once, in one thread: the driver locks for one at a time."""

    def __init__(
        self, register: Callable[[int, int, torch.device], int] = register, piece_bytes: int = PIECE_BYTES
    ) -> None:
        self.register, self.piece_bytes = register, piece_bytes
        self.thread = ThreadPoolExecutor(1, "page-lock")
        self._files: dict[int, LockedFile] = {}  # by address
        self._lock = threading.Lock()

    def file(self, path: str, address: int, size: int, device: torch.device) -> LockedFile:
        """Return a file's page-locked mapping, made once in a process, for all its GPUs."""
        with self._lock:
            if address not in self._files:
                self._files[address] = LockedFile(path, address, size, device, self)
            return self._files[address]

    def lock_ahead(self, paths: Iterable[Path], device: torch.device) -> None:
        """Begin to page-lock files that are about to be loaded as they are, in mappings that loading will recognise."""
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
        for name in weights.private:
            weights.tensors[name] = weights.tensors[name].pin_memory()
        self._pieces: list[Piece] = []
        for path, file in sorted(weights.files.items(), key=lambda item: item[1].data_ptr()):  # as swapping in goes
            self._pieces += locker.file(path, file.data_ptr(), file.nbytes, device).pieces

    def parts(self, tensor: torch.Tensor) -> Iterator[Part]:
        """Yield a contiguous weight's bytes in parts that may be copied, each once its locking has had its turn."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        index = max(0, bisect.bisect_right(self._pieces, start, key=lambda piece: piece.start) - 1)
        mapped = False
        for piece in itertools.takewhile(lambda piece: piece.start < end, self._pieces[index:]):
            if piece.end > start:
                mapped = True
                yield Part(max(piece.start, start) - start, min(piece.end, end) - start, piece.locked.result())
        if not mapped:  # a private one
            yield Part(0, tensor.nbytes, True)
