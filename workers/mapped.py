"""A module's weights where loading left them: mapped from the checkpoint's files, shared by all that map them.

`from_pretrained` keeps a parameter in the file's mapping if nothing had to be cast or converted. Page-locked in place,
read-only, such weights pass to a GPU at the speed of the link and are never copied back.
"""

import bisect
import logging
import mmap
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from protocol.units import format_bytes

log = logging.getLogger(__name__)

REGISTER_READ_ONLY = 8  # cudaHostRegisterReadOnly: without it, page-locking would copy a private mapping


@dataclass(frozen=True, slots=True)
class HostWeights:
    """Parameters in host memory by their names in the module; those that are shared come once."""

    tensors: dict[str, torch.Tensor]
    private: frozenset[str]  # names of copies that this process holds for itself; the rest lies in files' mappings

    @property
    def private_bytes(self) -> int:
        return sum(self.tensors[name].nbytes for name in self.private)


def host_weights(module: torch.nn.Module, name: str) -> HostWeights:
    """The weights of a module on the CPU; says once in the log how much of them is a private copy."""
    tensors = {key: parameter.data for key, parameter in module.named_parameters()}
    files = file_mappings()
    weights = HostWeights(tensors, frozenset(key for key, t in tensors.items() if t.nbytes and not within(t, files)))
    if weights.private:
        log.info(
            "%s of %s's weights are a private copy: a cast or conversion made it",
            format_bytes(weights.private_bytes), name,
        )  # fmt: skip
    return weights


def within(tensor: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether a tensor lies in one of sorted address ranges."""
    index = bisect.bisect_right(ranges, (tensor.data_ptr(), sys.maxsize)) - 1
    return index >= 0 and tensor.data_ptr() + tensor.nbytes <= ranges[index][1]


def file_mappings() -> list[tuple[int, int]]:
    """Address ranges of mapped safetensors files, sorted, neighbours joined; none where /proc doesn't tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    for line in lines:
        fields = line.split(maxsplit=5)
        # A hub cache links its snapshots to blobs whose names have no suffix.
        if len(fields) == 6 and (fields[5].endswith(".safetensors") or "/blobs/" in fields[5]):
            start, end = (int(part, 16) for part in fields[0].split("-"))
            found.append((start, end))
    return joined(found)


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted address ranges, those that touch or overlap made one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def page_lock(weights: HostWeights) -> bool:
    """Page-lock weights for this process's life: mapped ones in place, private ones as a page-locked copy.

    False, with a message in the log, where the driver refuses: then they pass through a buffer.
    """
    mapped = [tensor for name, tensor in weights.tensors.items() if name not in weights.private and tensor.nbytes]
    pages = joined(
        (t.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, -(-(t.data_ptr() + t.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE)
        for t in mapped
    )
    cudart = torch.cuda.cudart()
    for start, end in pages:
        code = int(cudart.cudaHostRegister(start, end - start, REGISTER_READ_ONLY))
        if code:
            log.warning("page-locking mapped weights was refused (CUDA error %d); copying through a buffer", code)
            return False
    for name in weights.private:
        weights.tensors[name] = weights.tensors[name].pin_memory()
    return True
