"""A module's weights where loading left them: mapped from the checkpoint's files, shared by all that map them.

`from_pretrained` keeps a parameter in the file's mapping if nothing had to be cast or converted. Page-locked in place,
read-only, such weights pass to a GPU at the speed of the link and are never copied back.
"""

import bisect
import logging
from collections.abc import Iterable
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
    private_bytes: int  # of copies that this process holds for itself; the rest lies in files' mappings

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def host_weights(module: torch.nn.Module, name: str) -> HostWeights:
    """The weights of a module on the CPU; says once in the log how much of them is a private copy."""
    tensors = {key: parameter.data for key, parameter in module.named_parameters()}
    private = private_bytes(tensors.values())
    if private:
        log.info("%s of %s's weights are a private copy: a cast or conversion made one", format_bytes(private), name)
    return HostWeights(tensors, private)


def private_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors that lie in no file's mapping, by the kernel's account; 0 where it gives none."""
    files = file_mappings()
    if files is None:
        return 0
    starts = [start for start, _ in files]
    total = 0
    for tensor in tensors:
        index = bisect.bisect_right(starts, tensor.data_ptr()) - 1
        if tensor.nbytes and (index < 0 or tensor.data_ptr() + tensor.nbytes > files[index][1]):
            total += tensor.nbytes
    return total


def file_mappings() -> list[tuple[int, int]] | None:
    """Address ranges of mapped safetensors files, sorted, neighbours joined; None where /proc doesn't tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    found: list[tuple[int, int]] = []
    for line in lines:
        fields = line.split(maxsplit=5)
        # A hub cache links its snapshots to blobs whose names have no suffix.
        if len(fields) == 6 and (fields[5].endswith(".safetensors") or "/blobs/" in fields[5]):
            start, end = (int(part, 16) for part in fields[0].split("-"))
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
    return found


def page_lock(tensors: Iterable[torch.Tensor]) -> bool:
    """Page-lock the storages of host tensors in place, for this process's life; False, with a message, if refused."""
    cudart = torch.cuda.cudart()
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors) if s.nbytes()}
    for address, size in storages.items():
        code = int(cudart.cudaHostRegister(address, size, REGISTER_READ_ONLY))
        if code:
            log.warning("page-locking the mapped weights was refused (CUDA error %d); copying through a buffer", code)
            return False
    return True
