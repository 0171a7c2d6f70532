"""A module's weights where loading left them: in the checkpoint's files, mapped, shared by all that map them.

`from_pretrained` keeps a parameter in a private mapping of its file if nothing had to be cast or converted.
Page-locking a private mapping would copy it, page by page, so the file is mapped a second time, shared and read-only:
the same pages of the page cache, page-locked in place. They pass to a GPU at the speed of the link, and are never
copied back.
"""

import bisect
import functools
import logging
import mmap
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from protocol.units import format_bytes
from workers.weights.sharded import LocalPart

log = logging.getLogger(__name__)


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
