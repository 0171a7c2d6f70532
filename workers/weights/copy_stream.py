"""Copies beside computation: a stream of its own on a GPU; on a CPU the same calls, each done when it returns."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from workers.tensors import flat_bytes
from workers.weights.host_weights import PageLocks

Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]  # (place, source)


class Mark:
    """A moment in a queue of work, to be waited for."""

    __slots__ = ("event",)

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self.event = event


class CopyStream(Protocol):
    device: torch.device

    def mark(self) -> Mark:
        """Mark what has been queued for computation up to now."""

    def copy(self, copies: Copies, after: Mark) -> Mark:
        """Copy once `after` has been reached, without holding up the computation."""

    def wait(self, mark: Mark) -> None:
        """Let the computation that is queued from now on wait for a copy."""

    def synchronize(self) -> None:
        """Wait here until everything queued is done."""


class HostCopyStream:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        return Mark(None)

    def copy(self, copies: Copies, after: Mark) -> Mark:
        for place, source in copies:
            place.copy_(source)
        return Mark(None)

    def wait(self, mark: Mark) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CudaCopyStream:
    """A CUDA stream for copies; weights that `locks` has not page-locked pass through a page-locked buffer."""

    def __init__(self, device: torch.device, locks: PageLocks) -> None:
        self.device, self._locks = device, locks
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def mark(self) -> Mark:
        return Mark(torch.cuda.current_stream(self.device).record_event())

    def copy(self, copies: Copies, after: Mark) -> Mark:
        with torch.cuda.stream(self._stream):
            assert after.event is not None
            self._stream.wait_event(after.event)
            for place, source in copies:
                to, what = flat_bytes(place), flat_bytes(source)
                for part in self._locks.parts(source):  # no copy may reach over two pieces of locked memory
                    self._copy(to[part.start : part.end], what[part.start : part.end], part.locked)
            return Mark(self._stream.record_event())

    def _copy(self, place: torch.Tensor, source: torch.Tensor, locked: bool) -> None:
        if locked:
            place.copy_(source, non_blocking=True)
            return
        if not self._buffers:
            self._buffers = [
                (torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)
            ]
        for start in range(0, source.nbytes, BUFFER_BYTES):
            part = source[start : start + BUFFER_BYTES]
            buffer, free = self._buffers[self._turn]
            self._turn = 1 - self._turn
            free.synchronize()
            buffer[: part.nbytes].copy_(part)
            place[start : start + part.nbytes].copy_(buffer[: part.nbytes], non_blocking=True)
            free.record(self._stream)

    def wait(self, mark: Mark) -> None:
        assert mark.event is not None
        torch.cuda.current_stream(self.device).wait_event(mark.event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


CopyStreams = Callable[[torch.device, PageLocks | None], CopyStream]
BUFFER_BYTES = 32 << 20  # of page-locked memory, twice, where the weights themselves can't be page-locked


def copy_stream_for(device: torch.device, locks: PageLocks | None) -> CopyStream:
    """Return a device's copy stream; `locks` are those of the weights that a GPU's stream is to copy."""
    return HostCopyStream(device) if locks is None else CudaCopyStream(device, locks)
