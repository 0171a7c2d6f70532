"""A worker's lease of a GPU: taken as the orchestrator says, kept to, and given back.

A worker on several GPUs has a lease of each, and takes all of them or none.
"""

import functools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from protocol.errors import DoesNotFit
from protocol.gpu_memory import Lease, WeightNeed
from protocol.messages.worker import Leased
from protocol.units import format_bytes
from workers.errors import cause_of
from workers.weights.residency import Residency

log = logging.getLogger(__name__)

UNMEASURED_CONTEXT = 1_000_000_000  # bytes; where the driver tells nothing about single processes
SLACK = 32 << 20  # bytes by which a driver's count and the allocator's may differ
VERIFY_SECONDS = 10.0  # that a driver may take to count what was freed
NOTHING = Lease(bytes=0, weight_bytes=0)


class AnyGpuLease(Protocol):
    """The lease of this process, or of another that works with it."""

    def needs(self) -> WeightNeed: ...
    def take(self, size: int, weights: int) -> None: ...
    def give_back(self) -> None: ...
    def kept_bytes(self) -> int: ...
    def context_bytes(self) -> int: ...


@dataclass(slots=True)
class GpuLease:
    """A lease of one GPU; `workspace` is the stage's bytes beside weights for a picture of 1024 × 1024, erring high."""

    device: torch.device
    residencies: Sequence[Residency]
    workspace: int
    most: int | None = None  # bytes that it shall ever have for weights; None: all of them
    _bytes: int = 0  # of the lease
    _kept: int = 0  # bytes of the allocator's that stay when everything is given back, as last measured

    def __post_init__(self) -> None:
        self._kept = self._reserved()  # what getting ready has left, before any lease

    def needs(self) -> WeightNeed:
        weights = sum(residency.wanted_bytes for residency in self.residencies)
        least = sum(residency.least_bytes for residency in self.residencies)
        return WeightNeed(
            weights=weights if self.most is None else max(least, min(weights, self.most)),
            least=least,
            workspace=self.workspace if self.device.type == "cuda" else 0,
        )

    def take(self, size: int, weights: int) -> None:
        """Keep to `size` bytes from now on, and bring the weights in, as far as `weights` bytes hold them; DoesNotFit.

        The smaller components come in whole first; what is left is the largest one's.
        """
        if weights < sum(residency.device_bytes for residency in self.residencies):
            self.give_back()
        self._bytes = size
        self._cap(size)
        left = weights
        ordered = sorted(self.residencies, key=lambda residency: residency.total_bytes)
        for index, residency in enumerate(ordered):
            others = sum(other.least_bytes for other in ordered[index + 1 :])
            residency.swap_in(min(residency.wanted_bytes, left - others))
            left -= residency.taken_bytes

    def give_back(self) -> None:
        """Let go of everything, and wait until the driver counts it as free.

        What a driver counts late is not booked: the orchestrator asks it again before it lends anything.
        """
        before, allocated = self._driver_bytes(), self._reserved()
        for residency in self.residencies:
            residency.swap_out()
        self._bytes = 0
        if self.device.type != "cuda":
            return
        self._tidy()
        self._kept = self._reserved()
        self._cap(0)
        self._confirm(before, allocated)

    def lend(self, size: int) -> bool:
        """Free `size` bytes of the lease until `take_again`, of weights what is not to be had otherwise.

        Between two forwards, when workspace is free. Return False, with all as it was, where there are not so many.
        """
        before, allocated = self._driver_bytes(), self._reserved()
        for residency in self.residencies:
            residency.drop_graphs()
        self._tidy()
        for residency in sorted(self.residencies, key=lambda residency: -residency.device_bytes):
            residency.lend(self._in_use() - self._bytes + size)
            self._tidy()
        if self._in_use() > self._bytes - size:
            self.take_again(self._bytes)
            return False
        self._cap(self._bytes - size)
        self._confirm(before, allocated)
        return True

    def take_again(self, size: int) -> None:
        """Take back what was lent, in a lease of `size` bytes; some less than before are missing to workspace."""
        self._bytes = size
        self._cap(size)
        for residency in self.residencies:
            residency.take_again()

    def _in_use(self) -> int:
        """Bytes of the lease in use; a CPU that stands in for a GPU counts weights alone."""
        if self.device.type == "cuda":
            return self._reserved() - self._kept
        return sum(residency.device_bytes for residency in self.residencies)

    def _tidy(self) -> None:
        """Give back to the driver what the allocator holds and nobody uses."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch._C._cuda_clearCublasWorkspaces()  # which the allocator counts as in use
            torch.cuda.empty_cache()

    def _confirm(self, before: int | None, allocated: int) -> None:
        """Wait until the driver, which has counted `before` bytes, counts less by what the allocator gave back."""
        if before is None:
            return
        wanted = before - (allocated - self._reserved()) + SLACK
        deadline = time.monotonic() + VERIFY_SECONDS
        while (now := self._driver_bytes()) is not None and now > wanted:
            if time.monotonic() > deadline:
                log.warning("the driver still counts %d bytes that were given back", now - wanted)
                return
            time.sleep(0.001)

    def kept_bytes(self) -> int:
        """Bytes that this process holds beside its context and any lease, as measured when it last gave all back."""
        return self._kept

    def context_bytes(self) -> int:
        """Return the bytes of this process's CUDA context with its libraries and kernels; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        found = self._driver_bytes()
        return UNMEASURED_CONTEXT if found is None else max(0, found - self._reserved())

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def _cap(self, size: int) -> None:
        """Hold the allocator to a lease of `size` bytes, beside what it keeps."""
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (size + self._kept) / total), self.device)

    def _driver_bytes(self) -> int | None:
        """Bytes that the driver counts for this process on its GPU; None where it doesn't tell."""
        if self.device.type != "cuda":
            return None
        import pynvml

        try:
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(driver_handle(self.device))
        except pynvml.NVMLError:
            return None
        return next((int(p.usedGpuMemory) for p in running if p.pid == os.getpid() and p.usedGpuMemory), None)


@functools.cache
def driver_handle(device: torch.device) -> Any:
    """NVML's name for a GPU."""
    import pynvml

    pynvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def apply_leases(gpu_leases: Sequence[AnyGpuLease], leases: Sequence[Lease]) -> Leased:
    """Apply a lease to each GPU, and return the outcome: where not all can be taken, all is given back."""
    start, reason = time.perf_counter(), ""
    try:
        for gpu_lease, lease in zip(gpu_leases, leases, strict=True):
            if lease.bytes:
                gpu_lease.take(lease.bytes, lease.weight_bytes)
    except (torch.OutOfMemoryError, DoesNotFit) as error:
        reason = cause_of(error)
        log.warning("a lease of %s was too small: %s", told(leases), error)
    if reason or not any(lease.bytes for lease in leases):
        leases = [NOTHING] * len(gpu_leases)
        for gpu_lease in gpu_leases:
            gpu_lease.give_back()
    kept = [gpu_lease.kept_bytes() for gpu_lease in gpu_leases]
    contexts = [gpu_lease.context_bytes() for gpu_lease in gpu_leases]
    log.info(
        "lease of %s taken in %.2f s; %s kept beside it, and %s of context",
        told(leases), time.perf_counter() - start, ", ".join(map(format_bytes, kept)),
        ", ".join(map(format_bytes, contexts)),
    )  # fmt: skip
    return Leased(
        leases=tuple(leases), kept_bytes=tuple(kept), context_bytes=tuple(contexts), reason=reason,
    )  # fmt: skip


def told(leases: Sequence[Lease]) -> str:
    return ", ".join(format_bytes(lease.bytes) for lease in leases)
